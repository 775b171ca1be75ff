/** The Train node shows the training that it has begun: pace, losses, the newest sample. */

import { app } from "../../../scripts/app.js";
import { after, element, showOnNode } from "./dom.js";
import { pace, samplePicture } from "./job_card.js";
import { JobProgress } from "./job_progress.js";
import * as jobs from "./jobs.js";
import { LossChart } from "./loss_chart.js";
import { t } from "./words.js";

const TRAIN = "CustomDiffusionTrain";
const JOB = "custom_diffusion_job"; // a property of the node, so that the chart is there after a reload
const HEIGHT = 190;
const shown = new Map(); // job → what shows it on nodes

class NodeTraining {
  constructor() {
    this.pace = element("p", "cd-pace");
    this.chart = new LossChart();
    this.newest = element("div", "cd-samples");
    this.element = element("div", "cd-training", this.pace, this.chart.element, this.newest);
  }

  /** Shows another job. */
  async watch(id) {
    this.leave();
    this.id = id;
    if (!shown.has(id)) shown.set(id, new Set());
    shown.get(id).add(this);
    this.progress = new JobProgress(id, (now) => this.#show(now), (error) => this.#fail(error));
    await this.progress.refresh(true);
  }

  /** Its node is gone, or has begun another job: nothing more is asked of the server. */
  leave() {
    shown.get(this.id)?.delete(this);
  }

  hear(job) {
    if (this.step > job.step) this.progress.restart();
    this.step = job.step;
    this.#tell(job);
    this.progress.refresh(!jobs.ACTIVE.includes(job.state));
  }

  #show({ losses, shown: job }) {
    this.#tell(job);
    this.chart.show(losses);
    const step = job.samples.at(-1);
    if (step === this.sample) return;
    this.sample = step;
    this.newest.replaceChildren(samplePicture(this.id, step));
  }

  #tell(job) {
    this.pace.textContent = `${t(job.state)}: ${job.error || pace(job)}`;
  }

  /** The job was deleted, or is another ComfyUI's. */
  #fail(error) {
    this.pace.textContent = error.message;
  }
}

const placed = new WeakMap();

function watchOn(node, id) {
  if (!placed.has(node)) {
    const training = new NodeTraining();
    placed.set(node, training);
    after(node, "onRemoved", () => training.leave());
    showOnNode(node, "training", training.element, HEIGHT);
  }
  placed.get(node).watch(id);
}

/** The node of an id as prompts have it: "3", or "12:3" for one in a subgraph. */
function nodeOf(id) {
  let graph = app.graph;
  let node = null;
  for (const part of String(id).split(":")) {
    node = graph?._nodes.find((each) => String(each.id) === part);
    graph = node?.subgraph;
  }
  return node;
}

/** A node that came with a workflow may have begun a job. */
export function showTraining(node) {
  if (node.comfyClass === TRAIN && node.properties?.[JOB]) watchOn(node, node.properties[JOB]);
}

export function registerTraining() {
  jobs.listen((job) => {
    for (const training of shown.get(job.id) ?? []) training.hear(job);
  });
  jobs.listenToNodes(({ node: id, job }) => {
    const node = nodeOf(id);
    if (node?.comfyClass !== TRAIN) return; // another workflow is open now
    node.properties[JOB] = job;
    watchOn(node, job);
  });
}
