/** The training jobs as the server tells of them: docs/http-api.md. */

import { api } from "../../../scripts/api.js";

const JOBS = "/custom_diffusion/jobs";
const EVENT = "custom_diffusion.job";

export const ACTIVE = ["queued", "preparing", "running"];

async function ask(method, path, body) {
  const options = { method };
  if (body !== undefined) {
    options.body = JSON.stringify(body);
    options.headers = { "Content-Type": "application/json" };
  }
  const answer = await api.fetchApi(`${JOBS}${path}`, options);
  const told = await answer.json();
  if (!answer.ok) throw new Error(told.error);
  return told;
}

const of = (id) => `/${encodeURIComponent(id)}`;

/** @returns {Promise<{jobs: object[], queue: string[]}>} */
export const list = () => ask("GET", "");
export const show = (id) => ask("GET", of(id));
export const steer = (id, action) => ask("POST", `${of(id)}/${action}`);
export const remove = (id) => ask("DELETE", of(id));
export const sampleUrl = (id, step) => api.apiURL(`${JOBS}${of(id)}/samples/${step}`);

/** The losses of the steps after `after`; null for one that was not finite. */
export async function losses(id, after) {
  return (await ask("GET", `${of(id)}/metrics?after=${after}`)).losses;
}

/** Queues the graph that a job came from: the job goes on. */
export async function startAgain(id) {
  const prompt = await ask("GET", `${of(id)}/graph`);
  const answer = await api.fetchApi("/prompt", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ prompt, client_id: api.clientId }),
  });
  if (!answer.ok) {
    const { error } = await answer.json();
    throw new Error(error?.message ?? `ComfyUI refused the graph (${answer.status}).`);
  }
}

/** Calls `onJob` with every job that changes, and `onReturn` when the server is back. */
export function listen(onJob, onReturn) {
  api.addEventListener(EVENT, ({ detail }) => onJob(detail));
  api.addEventListener("reconnected", onReturn);
}
