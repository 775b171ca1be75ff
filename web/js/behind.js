/** The nodes behind a training in the background: they have not run, and say what will run when. */

import { app } from "../../../scripts/app.js";
import { element } from "./dom.js";
import * as jobs from "./jobs.js";
import { t } from "./words.js";

const BLOCKED = new Set([0, 1]); // of the Train node's outputs: the concept and the losses
const shown = new Map(); // job → what tells of it on nodes

/**
 * The nodes of a prompt that a training blocks: those that it feeds, and those that show something.
 * @returns {string[]} their ids
 */
export function nodesBehind(nodes, train) {
  const first = fedBy(nodes, (id, slot) => id === train && BLOCKED.has(slot));
  const blocked = new Set(first);
  for (let more = first; more.length; ) {
    more = fedBy(nodes, (id) => blocked.has(id)).filter((id) => !blocked.has(id));
    for (const id of more) blocked.add(id);
  }
  return [...blocked].filter((id) => first.includes(id) || shows(nodes[id].class_type));
}

function fedBy(nodes, isSource) {
  const isFed = (value) => Array.isArray(value) && value.length === 2 && isSource(...value);
  return Object.keys(nodes).filter((id) => Object.values(nodes[id].inputs).some(isFed));
}

const shows = (comfyClass) => LiteGraph.registered_node_types[comfyClass]?.nodeData?.output_node;

export class Behind {
  constructor(id, node) {
    this.id = id;
    this.node = node;
    this.element = element("p", "cd-behind");
    this.element.setAttribute("role", "status");
    if (!shown.has(id)) shown.set(id, new Set());
    shown.get(id).add(this);
    jobs.show(id).then(
      (job) => this.tell(job),
      () => this.tell({ state: "deleted" }),
    );
  }

  tell(job) {
    if (job.name) this.name = job.name;
    const told = t(sentenceOf(job.state), { name: this.name ?? this.id, state: t(job.state) });
    const old = showsPicture(this.node) ? [t("oldPicture")] : [];
    this.element.textContent = [told, ...old].join(" ");
  }

  leave() {
    shown.get(this.id)?.delete(this);
    this.element.remove();
  }
}

function sentenceOf(state) {
  if (state === "finished") return "behindFinished";
  return [...jobs.ACTIVE, "paused"].includes(state) ? "behindWaits" : "behindEnded";
}

function showsPicture(node) {
  return Boolean(node.imgs?.length || app.nodeOutputs?.[node.id]?.images?.length);
}

/** To be called once. */
export function registerBehind() {
  jobs.listen((job) => {
    for (const one of shown.get(job.id) ?? []) one.tell(job);
  });
}
