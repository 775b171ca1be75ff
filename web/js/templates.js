/** The pack's workflows that ComfyUI offers as templates. */

import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";
import { t } from "./words.js";

const FOLDER = decodeURIComponent(import.meta.url.match(/\/extensions\/([^/]+)\//)[1]);

/** In a tab of its own, as if chosen from ComfyUI's templates. Their names say their order. */
export async function openFirstTemplate() {
  const names = (await (await api.fetchApi("/workflow_templates")).json())[FOLDER];
  if (!names?.length) throw new Error(t("noTemplate"));
  const [first] = names.toSorted();
  const path = `/workflow_templates/${encodeURIComponent(FOLDER)}/${encodeURIComponent(first)}.json`;
  const workflow = await (await api.fetchApi(path)).json();
  await app.loadGraphData(workflow, true, true, first, { openSource: "template" });
}
