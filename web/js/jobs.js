/** The training jobs as the server tells of them: docs/http-api.md. */

import { api } from "../../../scripts/api.js";
import { t } from "./words.js";

const JOBS = "/custom_diffusion/jobs";
const EVENT = "custom_diffusion.job";
const NODE_EVENT = "custom_diffusion.node";
const PREPARING_EVENT = "custom_diffusion.preparing";

const COMPARE = "compare-steps";
/** What the node offers too; without questions. */
const COMPARED = {
  negative: "",
  steps: "",
  strengths: "0.6, 0.8, 1",
  seeds: "0, 1",
  sampling_steps: 25,
  cfg: 6,
  sampler_name: "euler",
  scheduler: "normal",
};

export const ACTIVE = ["queued", "preparing", "running"];

/** Asks the pack's part of the server. Throws an Error with its reason. */
export async function ask(method, path, body) {
  // Also without a body: what is not said to be JSON could come from a form on another site.
  const options = { method, headers: { "Content-Type": "application/json" } };
  if (body !== undefined) options.body = JSON.stringify(body);
  const answer = await api.fetchApi(path, options);
  const told = await answer.json();
  if (!answer.ok) throw new Error(told.error);
  return told;
}

const of = (id) => `${JOBS}/${encodeURIComponent(id)}`;

/** @returns {Promise<{jobs: object[], queue: string[]}>} */
export const list = () => ask("GET", JOBS);
export const show = (id) => ask("GET", of(id));
export const steer = (id, action) => ask("POST", `${of(id)}/${action}`);
export const remove = (id) => ask("DELETE", of(id));
export const sampleUrl = (id, step) => api.apiURL(`${of(id)}/samples/${step}`);

/**
 * The losses of the steps after `after`, null for one that was not finite; and those on pictures that
 * are kept back, by step.
 * @returns {Promise<{losses: (number|null)[], validation: Object<string, number>}>}
 */
export const metrics = (id, after) => ask("GET", `${of(id)}/metrics?after=${after}`);

/** In which settings two jobs differ: setting → [its value in the one, in the other]. */
export const differences = (id, other) => ask("GET", `${of(id)}/differences?other=${encodeURIComponent(other)}`);

/**
 * Queues the graph that a job came from: the job goes on. With `steps`, so many in all: another job
 * goes on from where this one has come to.
 */
export async function startAgain(id, steps) {
  const prompt = await ask("GET", `${of(id)}/graph`);
  if (steps) await lengthen(prompt, id, steps);
  const queued = await queue(prompt);
  if (!steps) await begun(id, queued);
}

/** The rule by which a job has ended early would end the longer one at once. */
async function lengthen(prompt, id, steps) {
  const job = await show(id);
  const { inputs } = prompt[job.node];
  inputs["method.steps"] = steps;
  if (job.step < job.steps) inputs.early_stopping = "suggested";
}

/** Queues a graph and returns the id of its prompt. Throws ComfyUI's reason where it refuses it. */
async function queue(prompt) {
  const answer = await api.fetchApi("/prompt", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ prompt, client_id: api.clientId }),
  });
  const queued = await answer.json();
  if (!answer.ok) throw new Error(refusal(queued) ?? t("refused", { status: answer.status }));
  return queued.prompt_id;
}

export const comparison = (id) => ask("GET", `${of(id)}/comparison`);
export const comparedUrl = (id, picture) => api.apiURL(`${of(id)}/comparison/pictures/${picture}`);
export const takeStep = (id, picture, name) => ask("POST", `${of(id)}/comparison/take`, { picture, name });

/** Draws a job's kept steps beside each other, with the models of its own graph; waits for the end. */
export async function compare(id, prompt) {
  const [graph, job] = await Promise.all([ask("GET", `${of(id)}/graph`), show(id)]);
  const { model, clip, vae } = graph[job.node].inputs;
  const { resolution } = job.config;
  const inputs = { model, clip, vae, resolution, job_id: id, prompt, ...COMPARED };
  const sheet = { class_type: "CompareSteps", inputs };
  await ended(await queue(neededBy(COMPARE, { ...graph, [COMPARE]: sheet })));
}

/** The part of a graph that a node needs. */
function neededBy(node, graph, found = {}) {
  found[node] = graph[node];
  for (const value of Object.values(graph[node].inputs)) {
    const from = Array.isArray(value) && value[0];
    if (from in graph && !(from in found)) neededBy(from, graph, found);
  }
  return found;
}

/** Why ComfyUI takes no prompt: what it says of a node says more than what it says of all. */
function refusal({ error, node_errors }) {
  const [first] = Object.values(node_errors ?? {}).flatMap(({ errors }) => errors);
  return first ? [first.message, first.details].filter(Boolean).join(": ") : error?.message;
}

/** Waits until a prompt has begun or found the job, or has ended; throws when it failed before. */
const begun = (id, prompt) =>
  ended(prompt, (job) => job.id === id && ACTIVE.includes(job.state));

/** Waits until a prompt has ended, or some job is as wished; throws when the prompt failed. */
function ended(prompt, isWished = () => false) {
  const heard = new AbortController();
  return new Promise((resolve, reject) => {
    const acts = {
      [EVENT]: (job) => isWished(job) && resolve(),
      execution_error: (end) => end.prompt_id === prompt && reject(new Error(end.exception_message)),
      execution_interrupted: (end) => end.prompt_id === prompt && reject(new Error(t("interrupted"))),
      execution_success: (end) => end.prompt_id === prompt && resolve(),
      reconnected: resolve, // the server that had it is gone
    };
    for (const [event, act] of Object.entries(acts)) {
      api.addEventListener(event, ({ detail }) => act(detail), { signal: heard.signal });
    }
  }).finally(() => heard.abort());
}

/** Calls `onJob` with every job that changes, and `onReturn` when the server is back. */
export function listen(onJob, onReturn = () => {}) {
  api.addEventListener(EVENT, ({ detail }) => onJob(detail));
  api.addEventListener("reconnected", onReturn);
}

/**
 * Calls `onTold` with {node, prompt} and what a node of this page's prompt shows before it is done:
 * its `notes`; or the `job` that it has begun or found, and `blocks`: what needs its concept does not
 * run.
 */
export function listenToNodes(onTold) {
  api.addEventListener(NODE_EVENT, ({ detail }) => onTold(detail));
}

/** Calls `onTold` with {node, prompt, name, doing, done, total, progress} before there is a job, and
 * with an empty `doing`, and `failed`, at the end of that. */
export function listenToPreparations(onTold) {
  api.addEventListener(PREPARING_EVENT, ({ detail }) => onTold(detail));
}
