/** The training jobs as the server tells of them: docs/http-api.md. */

import { api } from "../../../scripts/api.js";
import { t } from "./words.js";

const JOBS = "/custom_diffusion/jobs";
const EVENT = "custom_diffusion.job";
const NODE_EVENT = "custom_diffusion.node";

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

/**
 * Queues the graph that a job came from: the job goes on. With `steps`, so many in all: another job
 * goes on from where this one has come to.
 */
export async function startAgain(id, steps) {
  const prompt = await ask("GET", `${of(id)}/graph`);
  if (steps) prompt[(await show(id)).node].inputs["method.steps"] = steps;
  const answer = await api.fetchApi("/prompt", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ prompt, client_id: api.clientId }),
  });
  const queued = await answer.json();
  if (!answer.ok) throw new Error(refusal(queued) ?? t("refused", { status: answer.status }));
  if (!steps) await begun(id, queued.prompt_id);
}

/** Why ComfyUI takes no prompt: what it says of a node says more than what it says of all. */
function refusal({ error, node_errors }) {
  const [first] = Object.values(node_errors ?? {}).flatMap(({ errors }) => errors);
  return first ? [first.message, first.details].filter(Boolean).join(": ") : error?.message;
}

/** Waits until a prompt has begun or found the job, or has ended; throws when it failed before. */
function begun(id, prompt) {
  const heard = new AbortController();
  return new Promise((resolve, reject) => {
    const acts = {
      [EVENT]: (job) => job.id === id && ACTIVE.includes(job.state) && resolve(),
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

/** Calls `onBegun` with {node, job, prompt} when a node of this page's prompt has begun or found a job. */
export function listenToNodes(onBegun) {
  api.addEventListener(NODE_EVENT, ({ detail }) => onBegun(detail));
}
