/** Nodes whose prompt waits in ComfyUI's queue: they are told of while it is there. */

import { api } from "../../../scripts/api.js";

const waiting = new Map(); // prompt → what is to be called when it has left the queue

/** Calls `onEnd` when the prompt is in the queue no more, whether it has run or was taken out. */
export function whenLeft(prompt, onEnd) {
  waiting.set(prompt, onEnd);
}

/** To be called once. */
export function registerQueue() {
  api.addEventListener("status", lookAround);
}

async function lookAround() {
  if (!waiting.size) return;
  const asked = [...waiting.keys()]; // what is queued meanwhile may not be in the answer
  const { queue_running, queue_pending } = await (await api.fetchApi("/queue")).json();
  const there = new Set([...queue_running, ...queue_pending].map(([, id]) => id));
  for (const prompt of asked.filter((id) => !there.has(id))) {
    waiting.get(prompt)?.();
    waiting.delete(prompt);
  }
}
