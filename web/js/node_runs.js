/** Below its widgets a node shows its last run: the sentence of an error, notes, a training. */

import { api } from "../../../scripts/api.js";
import { copyButton, element, showOnNode } from "./dom.js";
import * as jobs from "./jobs.js";
import { notesParts } from "./node_notes.js";
import { nodeOf, promptIds, workflowId } from "./nodes.js";
import { forgetErrors, originOf, recall, remember } from "./run_memory.js";
import { NodeTraining } from "./train_node.js";
import { t } from "./words.js";

const NOTES = "custom_diffusion"; // nodes/types.py
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

  show(place, { error, notes, job }) {
    this.place.textContent = place;
    if (error !== this.shownError) this.error.replaceChildren(...(error ? errorParts(error) : []));
    this.shownError = error;
    this.notes.replaceChildren(...(notes ? notesParts(notes) : []));
    if (job && job !== this.training?.id) this.#watch(job);
  }

  #watch(job) {
    if (!this.training) {
      this.training = new NodeTraining();
      this.element.append(this.training.element);
    }
    this.training.watch(job);
  }

  leave() {
    this.training?.leave();
    this.element.remove();
  }
}

function errorParts(error) {
  const said = element("p", "cd-trouble", error);
  said.setAttribute("role", "alert");
  return [said, copyButton(t("copyError"), t("copyErrorHint"), error)];
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

  show(runs) {
    for (const [id, run] of this.runs) {
      if (runs.has(id)) continue;
      run.leave();
      this.runs.delete(id);
    }
    for (const [id, shown] of runs) {
      if (!this.runs.has(id)) {
        this.runs.set(id, new Run());
        this.element.append(this.runs.get(id).element);
      }
      const [, ...within] = id.split(":").toReversed();
      const place = runs.size > 1 ? nodeOf(within.toReversed().join(":")) : null;
      this.runs.get(id).show(place ? t("place", { title: place.title, id: place.id }) : "", shown);
    }
  }
}

/** Shows what a node's last runs left; to be called when a workflow has brought it, too. */
export function showRuns(node) {
  const remembered = promptIds(node).map((id) => [id, recall(workflowId(), id, node.comfyClass)]);
  const runs = new Map(remembered.filter(([, run]) => run && (run.error || run.notes || run.job)));
  if (!runs.size && !displays.has(node)) return;
  if (!displays.has(node)) displays.set(node, new Display(node));
  displays.get(node).show(runs);
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

/** @param {function(string): boolean} isOurs whether a class of nodes is the pack's */
export function registerRuns(isOurs) {
  jobs.listenToNodes(({ node, prompt, notes, ...shown }) => {
    if (notes) shown.notes = worthShowing(notes);
    putOfPrompt(prompt, node, shown);
  });
  api.addEventListener("executed", ({ detail: { prompt_id, node, output } }) => {
    const [notes] = output?.[NOTES] ?? [];
    if (!notes) return;
    putOfPrompt(prompt_id, node, { notes: worthShowing(notes), error: null });
  });
  api.addEventListener("execution_error", ({ detail }) => {
    if (!isOurs(detail.node_type)) return;
    putOfPrompt(detail.prompt_id, detail.node_id, { error: detail.exception_message.trim() });
  });
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
    const tell = (refused) => {
      for (const [id, { class_type, errors }] of Object.entries(refused ?? {})) {
        if (isOurs(class_type)) put(workflow, id, class_type, { error: sentences(errors) });
      }
    };
    try {
      const answer = await queue.call(this, number, prompt, ...more);
      tell(answer.node_errors);
      return answer;
    } catch (error) {
      tell(error.response?.node_errors);
      throw error;
    }
  };
}

/** ComfyUI says what a node's own check has found once for each input that it was shown. */
const sentences = (errors) => [...new Set(errors.map(sentence))].join("\n");

/** A node's own check says all in its details, after the input's name. */
function sentence({ type, message, details }) {
  if (type === "custom_validation_failed") return details.replace(/^\S+ - /, "");
  return [message, details].filter(Boolean).join(": ");
}
