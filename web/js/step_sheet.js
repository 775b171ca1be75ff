/** The sheet of a training's steps against strengths and seeds: its pictures as they are drawn, and a
 * click on one saves its step as a concept. */

import { element } from "./dom.js";
import * as jobs from "./jobs.js";
import { t } from "./words.js";

const EVERY_MS = 1500;

export class StepSheet {
  /**
   * @param {{id: string, name: string}} job
   * @param {{onError: function(Error): void, askPrompt: function(object): Promise<string|null>,
   *          askStepName: function(object): Promise<string|null>, onTaken: function(): void}} host
   */
  constructor({ id, name }, host) {
    this.id = id;
    this.name = name;
    this.host = host;
    this.prompt = element("p", "cd-taught");
    this.grid = element("div", "cd-steps");
    this.taken = element("p", "cd-taught");
    this.taken.setAttribute("role", "status");
    this.element = element("div", "", this.prompt, this.grid, this.taken);
    this.element.hidden = true;
    this.shown = "";
  }

  /** Draws a new sheet, unless the user has thought better of it. */
  async draw(job) {
    const prompt = await this.host.askPrompt(job);
    if (prompt === null) return;
    const watching = setInterval(() => this.refresh().catch(() => {}), EVERY_MS); // not begun yet
    try {
      await jobs.compare(this.id, prompt);
      await this.refresh();
    } finally {
      clearInterval(watching);
    }
  }

  /** Asks for the sheet; there has to be one. */
  async refresh() {
    const sheet = await jobs.comparison(this.id);
    if (JSON.stringify(sheet) === this.shown) return;
    this.shown = JSON.stringify(sheet);
    this.#show(sheet);
  }

  #show({ prompt, steps, strengths, seeds, pictures }) {
    const columns = strengths.flatMap((strength) => seeds.map((seed) => ({ strength, seed })));
    const drawn = new Set(pictures);
    this.element.hidden = false;
    this.prompt.textContent = prompt;
    this.grid.style.setProperty("--cd-columns", columns.length);
    this.grid.replaceChildren(
      element("span"),
      ...columns.map((column) => element("span", "", t("stepColumn", column))),
      ...steps.flatMap((step, row) => [
        element("span", "", t("stepRow", { step })),
        ...columns.map((column, place) => {
          const picture = row * columns.length + place;
          return drawn.has(picture) ? this.#picture(picture, { step, ...column }) : element("span");
        }),
      ]),
    );
  }

  #picture(number, shown) {
    const picture = element("img");
    picture.src = jobs.comparedUrl(this.id, number);
    picture.loading = "lazy";
    picture.alt = t("takeStep", shown);
    const button = element("button", "cd-compared", picture);
    button.type = "button";
    button.title = picture.alt;
    button.addEventListener("click", () => this.#take(number, shown.step).catch(this.host.onError));
    return button;
  }

  async #take(picture, step) {
    const name = await this.host.askStepName({ name: this.name, step });
    if (!name) return;
    const { file } = await jobs.takeStep(this.id, picture, name);
    this.taken.textContent = t("taken", { step, file });
    this.host.onTaken();
  }
}
