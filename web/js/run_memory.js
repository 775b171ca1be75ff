/** What nodes showed of their last runs: errors, notes, trainings.
 *
 * It belongs to a node of a workflow, not to what is on the canvas at the moment: undo, another
 * workflow's tab and a reload make all nodes anew. So it is kept under the workflow's id and the
 * node's id as prompts have it ("3", or "12:3" for one in a subgraph). It is kept in the browser: in
 * the workflow it would make steps to undo, and travel with the file to where nothing has run.
 */

import { api } from "../../../scripts/api.js";

const KEY = "custom_diffusion.runs";
const MOST = 300; // nodes; the oldest go

const keyOf = (workflow, node) => `${workflow} ${node}`;

let parsed = ["[]", new Map()]; // text, runs: many nodes ask for the same

function read() {
  const text = localStorage.getItem(KEY) ?? "[]";
  if (text !== parsed[0]) parsed = [text, new Map(JSON.parse(text))];
  return new Map(parsed[1]);
}

/** Of other tabs of the browser too, because each reads before it writes. */
function write(runs) {
  let entries = [...runs].slice(-MOST);
  for (;;) {
    try {
      return localStorage.setItem(KEY, JSON.stringify(entries));
    } catch (error) {
      if (error.name !== "QuotaExceededError" || !entries.length) throw error;
      entries = entries.slice(Math.ceil(entries.length / 2)); // ComfyUI keeps its drafts there too
    }
  }
}

/**
 * What a node showed last, if it is still of that class.
 * @returns {{class: string, error?: string, notes?: object, job?: string,
 *            behind?: {job: string, train: string}}|undefined}
 */
export function recall(workflow, node, comfyClass) {
  const run = read().get(keyOf(workflow, node));
  return run?.class === comfyClass ? run : undefined;
}

/** Adds to what a node shows; what is null goes. */
export function remember(workflow, node, comfyClass, shown) {
  const runs = read();
  const key = keyOf(workflow, node);
  const before = runs.get(key);
  runs.delete(key); // the newest last
  runs.set(key, { ...(before?.class === comfyClass ? before : {}), ...shown, class: comfyClass });
  write(runs);
}

/** @returns {[string, object][]} the nodes of a workflow, with what they showed last */
export function runsOf(workflow) {
  const runs = [...read()].filter(([key]) => key.startsWith(`${workflow} `));
  return runs.map(([key, run]) => [key.slice(workflow.length + 1), run]);
}

/** @returns {string[]} the nodes of the workflow that showed an error */
export function forgetErrors(workflow) {
  const failed = runsOf(workflow).filter(([, run]) => run.error);
  for (const [node, run] of failed) remember(workflow, node, run.class, { error: null });
  return failed.map(([node]) => node);
}

const origins = new Map(); // prompt → promise

/**
 * Which workflow a prompt came from, as the server was sent it: another one may be open by now, and
 * the page may have been loaded again.
 * @returns {Promise<{workflow: string|undefined, nodes: object,
 *                    classOf: function(string): string|undefined}>}
 */
export function originOf(prompt) {
  if (!origins.has(prompt)) origins.set(prompt, lookUp(prompt));
  return origins.get(prompt);
}

const fetched = async (path) => (await api.fetchApi(path)).json();

async function lookUp(prompt) {
  const { queue_running: running } = await fetched("/queue");
  const found =
    running.find(([, id]) => id === prompt) ?? (await fetched(`/history/${prompt}`))[prompt]?.prompt;
  const [, , nodes = {}, more] = found ?? [];
  return {
    workflow: more?.extra_pnginfo?.workflow?.id,
    nodes,
    classOf: (node) => nodes[node]?.class_type,
  };
}
