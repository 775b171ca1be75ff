/** The concepts in ComfyUI's folders, as the server tells of them: docs/http-api.md. */

import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";
import { ask } from "./jobs.js";

const CONCEPTS = "/custom_diffusion/concepts";

const of = (name) => `${CONCEPTS}/${name.split("/").map(encodeURIComponent).join("/")}`;

/**
 * @param {{search?: string, base?: string, sort?: string}} wanted
 * @returns {Promise<{concepts: object[], unreadable: Object<string, string>, bases: Object<string, string>}>}
 */
export const list = (wanted = {}) => ask("GET", `${CONCEPTS}?${new URLSearchParams(wanted)}`);
export const show = (name) => ask("GET", of(name));
export const rename = (name, to) => ask("POST", `${of(name)}/rename`, { to });
export const remove = (name) => ask("DELETE", of(name));

/** Lets the lists of concepts on nodes hold what there is now; without a word where that goes. */
export const refreshChoices = () => app.reloadNodeDefs?.() ?? app.refreshComboInNodes();

export const thumbnailUrl = (name) => api.apiURL(`${of(name)}/thumbnail`);
