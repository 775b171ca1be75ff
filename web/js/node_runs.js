/** Below its widgets a node shows its last run: the sentence of an error, notes, a training, or that
 * it waits for one. */

import { api } from "../../../scripts/api.js";
import { Behind, nodesBehind } from "./behind.js";
import { element, errorParts, showOnNode } from "./dom.js";
import * as jobs from "./jobs.js";
import { notesParts } from "./node_notes.js";
import { nodeOf, promptIds, workflowId } from "./nodes.js";
import { forgetErrors, originOf, recall, remember, runsOf } from "./run_memory.js";
import { registerQueue, whenLeft } from "./queued.js";
import { NodeTraining } from "./train_node.js";
import { t } from "./words.js";

const NOTES = "custom_diffusion"; // nodes/types.py
const LEARNS = "CustomDiffusionTrain";
const HEIGHT = 60;
const displays = new WeakMap(); // node → what shows its runs

/** What one place shows: a node in a subgraph has as many as its subgraph is used. */
class Run {
  constructor() {
    this.place = element("p", "cd-place");
    this.error = element("div", "cd-error");
    this.notes = element("div", "cd-notes");
    this.element = element("div", "", this.place, this.error, this.notes);
  }

  show(place, { error, notes, job, behind }, node) {
    this.place.textContent = place;
    if (error !== this.shownError) this.error.replaceChildren(...(error ? errorParts(error) : []));
    this.shownError = error;
    this.notes.replaceChildren(...(notes ? notesParts(notes) : []));
    if (job && job !== this.training?.id) this.#theTraining().watch(job);
    if (behind?.job !== this.behind?.id) this.#waitFor(behind?.job, node);
  }

  /** Before there is a job. */
  prepare(told) {
    this.#theTraining().prepare(told);
  }

  #theTraining() {
    if (!this.training) {
      this.training = new NodeTraining();
      this.element.append(this.training.element);
    }
    return this.training;
  }

  #waitFor(job, node) {
    this.behind?.leave();
    this.behind = job && new Behind(job, node);
    if (job) this.element.append(this.behind.element);
  }

  leave() {
    this.training?.leave();
    this.behind?.leave();
    this.element.remove();
  }
}

class Display {
  constructor(node) {
    this.runs = new Map();
    this.element = element("div", "cd-runs");
    showOnNode(node, "runs", this.element, HEIGHT);
    const removed = node.onRemoved;
    node.onRemoved = function (...all) {
      for (const run of displays.get(node).runs.values()) run.leave();
      displays.get(node).runs.clear();
      return removed?.apply(this, all);
    };
  }

  show(runs, node) {
    for (const [id, run] of this.runs) {
      if (runs.has(id)) continue;
      run.leave();
      this.runs.delete(id);
    }
    for (const [id, shown] of runs) {
      const [, ...within] = id.split(":").toReversed();
      const place = runs.size > 1 ? nodeOf(within.toReversed().join(":")) : null;
      this.of(id).show(place ? t("place", { title: place.title, id: place.id }) : "", shown, node);
    }
  }

  of(id) {
    if (!this.runs.has(id)) {
      this.runs.set(id, new Run());
      this.element.append(this.runs.get(id).element);
    }
    return this.runs.get(id);
  }
}

/** Shows what a node's last runs left; to be called when a workflow has brought it, too. */
export function showRuns(node) {
  const remembered = promptIds(node).map((id) => [id, recall(workflowId(), id, node.comfyClass)]);
  const runs = new Map(remembered.filter(([, run]) => run && (run.error || run.notes || run.job || run.behind)));
  if (runs.size || displays.has(node)) displayOf(node).show(runs, node);
}

function displayOf(node) {
  if (!displays.has(node)) displays.set(node, new Display(node));
  return displays.get(node);
}

/** Keeps what a node has to show; shows it if its workflow is open. */
function put(workflow, id, comfyClass, shown) {
  remember(workflow, id, comfyClass, shown);
  refresh(workflow, id);
}

function refresh(workflow, id) {
  const node = workflow === workflowId() && nodeOf(id);
  if (node) showRuns(node);
}

function forget(workflow) {
  for (const id of forgetErrors(workflow)) refresh(workflow, id);
}

async function putOfPrompt(prompt, id, shown) {
  const { workflow, classOf } = await originOf(prompt);
  if (workflow) put(workflow, id, classOf(id), shown); // else a script sent it
}

/** A node has begun a job, or found it; what is behind the node runs, or does not. */
async function putTraining({ node, job, prompt, blocks }) {
  const { workflow, nodes, classOf } = await originOf(prompt);
  if (!workflow) return;
  put(workflow, node, classOf(node), { job });
  for (const [id, run] of runsOf(workflow)) {
    if (run.behind?.train === node) put(workflow, id, run.class, { behind: null });
  }
  if (!blocks) return;
  for (const id of nodesBehind(nodes, node)) put(workflow, id, classOf(id), { behind: { job, train: node } });
}

/** Known before the node is done. */
const putNotes = ({ node, prompt, notes }) => putOfPrompt(prompt, node, { notes: worthShowing(notes) });

/** What has run is not behind a training any more. */
async function putOutput({ prompt_id, node, output }) {
  const { workflow, classOf } = await originOf(prompt_id);
  if (!workflow) return;
  if (recall(workflow, node, classOf(node))?.behind) put(workflow, node, classOf(node), { behind: null });
  const [notes] = output?.[NOTES] ?? [];
  if (!notes) return;
  put(workflow, node, classOf(node), { notes: worthShowing(notes), error: null });
}

/** Before there is a job; afterwards its node shows what it showed before, or the job. */
async function prepare(told) {
  const { workflow } = await originOf(told.prompt);
  const node = workflow === workflowId() && nodeOf(told.node);
  if (!node) return;
  if (told.doing) displayOf(node).of(told.node).prepare(told);
  else if (told.failed) showRuns(node);
}

/** @param {function(string): boolean} isOurs whether a class of nodes is the pack's */
export function registerRuns(isOurs) {
  jobs.listenToNodes((told) => (told.job ? putTraining(told) : putNotes(told)));
  jobs.listenToPreparations(prepare);
  api.addEventListener("executed", ({ detail }) => putOutput(detail));
  api.addEventListener("execution_error", ({ detail }) => {
    if (!isOurs(detail.node_type)) return;
    putOfPrompt(detail.prompt_id, detail.node_id, { error: detail.exception_message.trim() });
  });
  registerQueue();
  hearRefusals(isOurs);
}

/** Notes, or null for an empty box. */
function worthShowing(notes) {
  return [notes.lines, notes.warnings, notes.table].some((part) => part.length) ? notes : null;
}

/** What ComfyUI refuses before anything runs is in no message, only in the answer to its page. */
function hearRefusals(isOurs) {
  const queue = api.queuePrompt;
  api.queuePrompt = async function (number, prompt, ...more) {
    const workflow = prompt.workflow?.id;
    forget(workflow);
    freeFromTrainings(workflow, prompt.output);
    const tell = (refused) => {
      for (const [id, { class_type, errors }] of Object.entries(refused ?? {})) {
        if (isOurs(class_type)) put(workflow, id, class_type, { error: sentences(errors) });
      }
    };
    try {
      const answer = await queue.call(this, number, prompt, ...more);
      tell(answer.node_errors);
      tellQueued(workflow, prompt.output, answer.prompt_id);
      return answer;
    } catch (error) {
      tell(error.response?.node_errors);
      throw error;
    }
  };
}

/** ComfyUI says what a node's own check has found once for each input that it was shown. */
const sentences = (errors) => [...new Set(errors.map(sentence))].join("\n");
/** From the click on: a training whose prompt waits for others is not forgotten. */
function tellQueued(workflow, nodes, prompt) {
  const trainings = Object.keys(nodes).filter((id) => nodes[id].class_type === LEARNS);
  for (const id of trainings) {
    const node = workflow === workflowId() && nodeOf(id);
    if (node) displayOf(node).of(id).prepare({ doing: "queued", progress: 0 });
  }
  whenLeft(prompt, () => trainings.forEach((id) => refresh(workflow, id)));
}

/** Of a graph whose training was taken out of it, nothing waits for that. */
function freeFromTrainings(workflow, nodes) {
  for (const [id, { class: comfyClass, behind }] of runsOf(workflow)) {
    const waits = behind && nodesBehind(nodes, behind.train).includes(id);
    if (behind && !waits) put(workflow, id, comfyClass, { behind: null });
  }
}

/** A node's own check says all in its details, after the input's name. */
function sentence({ type, message, details }) {
  if (type === "custom_validation_failed") return details.replace(/^\S+ - /, "");
  return [message, details].filter(Boolean).join(": ");
}
