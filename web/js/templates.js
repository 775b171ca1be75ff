/** The pack's workflows that ComfyUI offers as templates. */

import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";
import { t } from "./words.js";

const FOLDER = decodeURIComponent(import.meta.url.match(/\/extensions\/([^/]+)\//)[1]);
const LOADER = "CheckpointLoaderSimple";

/** In a tab of its own, as if chosen from ComfyUI's templates. Their names say their order. */
export async function openFirstTemplate() {
  const names = (await fetched("/workflow_templates"))[FOLDER];
  if (!names?.length) throw new Error(t("noTemplate"));
  const [first] = names.toSorted();
  const path = `/workflow_templates/${encodeURIComponent(FOLDER)}/${encodeURIComponent(first)}.json`;
  const workflow = await fetched(path);
  await takeOnlyCheckpoint(workflow);
  await app.loadGraphData(workflow, true, true, first, { openSource: "template" });
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
