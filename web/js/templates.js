/** The pack's workflows that ComfyUI offers as templates. */

import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";
import { t } from "./words.js";

const FOLDER = decodeURIComponent(import.meta.url.match(/\/extensions\/([^/]+)\//)[1]);
const LOADER = "CheckpointLoaderSimple";
const MARGIN = 90; // around what is shown, below ComfyUI's menu
const FITTED_MS = 100; // ComfyUI fits the whole graph into the window in the next frames

/** In a tab of its own, as if chosen from ComfyUI's templates. Their names say their order. */
export async function openFirstTemplate() {
  const names = (await fetched("/workflow_templates"))[FOLDER];
  if (!names?.length) throw new Error(t("noTemplate"));
  const [first] = names.toSorted();
  const path = `/workflow_templates/${encodeURIComponent(FOLDER)}/${encodeURIComponent(first)}.json`;
  const workflow = await fetched(path);
  await takeOnlyCheckpoint(workflow);
  await app.loadGraphData(workflow, true, true, first, { openSource: "template" });
  await showBeginning(workflow);
}

const fetched = async (path) => (await api.fetchApi(path)).json();

/** Where there is one checkpoint alone nobody has to choose it, or is asked to download another. */
async function takeOnlyCheckpoint(workflow) {
  const [only, ...others] = await fetched("/models/checkpoints");
  if (!only || others.length) return;
  for (const loader of workflow.nodes.filter((node) => node.type === LOADER)) {
    loader.widgets_values = [only];
    delete loader.properties.models;
  }
}

/** What has to be done first can be seen: fitted into the window it would lie behind the sidebar. */
async function showBeginning({ groups: [first] }) {
  await new Promise((resolve) => setTimeout(resolve, FITTED_MS));
  const { canvas, ds } = app.canvas;
  const page = canvas.getBoundingClientRect();
  const edge = document.querySelector(".cd-panel")?.getBoundingClientRect().right ?? page.left;
  const [left, top, , height] = first.bounding;
  ds.scale = Math.min(1, (page.height - 2 * MARGIN) / height);
  ds.offset = [(edge - page.left + MARGIN / 2) / ds.scale - left, MARGIN / ds.scale - top];
  app.canvas.setDirty(true, true);
}
