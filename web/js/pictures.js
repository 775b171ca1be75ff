/** The pictures of a folder of ComfyUI's input, as the server tells of them: docs/http-api.md. */

import { api } from "../../../scripts/api.js";
import { ask } from "./jobs.js";

const PICTURES = "/custom_diffusion/pictures";

const of = (folder, name) => `${PICTURES}/${encodeURIComponent(name)}?${new URLSearchParams({ folder })}`;

/** @returns {Promise<string[]>} */
export const list = async (folder) => (await ask("GET", `${PICTURES}?${new URLSearchParams({ folder })}`)).pictures;
export const remove = (folder, name) => ask("DELETE", of(folder, name));
export const thumbnailUrl = (folder, name) => api.apiURL(of(folder, name));
