/** The concepts in ComfyUI's folders, as the server tells of them: docs/http-api.md. */

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
export const thumbnailUrl = (name) => api.apiURL(`${of(name)}/thumbnail`);
