/** What a job has done until now, asked of the server bit by bit. */

import * as jobs from "./jobs.js";

const EVERY_MS = 1000;

export class JobProgress {
  /**
   * @param {string} id
   * @param {function({losses: (number|null)[], validation: Map<number, number>, shown: object}): void}
   *   onProgress what is known now: all losses, those on pictures kept back by step, and the job
   *   with its details
   * @param {function(Error): void} onError
   */
  constructor(id, onProgress, onError) {
    this.id = id;
    this.onProgress = onProgress;
    this.onError = onError;
    this.restart();
    this.askedAt = 0;
  }

  /** Forgets the losses: the job has begun anew. */
  restart() {
    this.losses = [];
    this.validation = new Map();
  }

  /** Asks for the losses since the last time; at most once a second, unless it must be `now`. */
  async refresh(now = false) {
    if (this.asking) {
      this.again ||= now; // what is on its way may be older
      return;
    }
    if (!now && Date.now() - this.askedAt < EVERY_MS) return;
    this.asking = true;
    this.askedAt = Date.now();
    try {
      const before = this.losses;
      const since = await jobs.metrics(this.id, before.length);
      const shown = await jobs.show(this.id);
      if (before === this.losses) {
        this.losses = before.concat(since.losses);
        for (const [step, loss] of Object.entries(since.validation)) this.validation.set(Number(step), loss);
        this.onProgress({ losses: this.losses, validation: this.validation, shown });
      } // else it began anew meanwhile
    } catch (error) {
      this.onError(error);
    } finally {
      this.asking = false;
    }
    if (!this.again) return;
    this.again = false;
    await this.refresh(true);
  }
}
