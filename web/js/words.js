/** The pack's words in the language of the page: locales/<language>/main.json. */

import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";

let words = {};

/** To be awaited once, before the first word is needed. What a language lacks is said in English. */
export async function loadWords() {
  const all = await (await api.fetchApi("/i18n")).json();
  const locale = app.extensionManager.setting.get("Comfy.Locale") ?? "en";
  const own = all[locale] ?? all[locale.split("-")[0]];
  words = { ...all.en?.customDiffusion, ...own?.customDiffusion };
}

/** t("step", {step: 3, steps: 10}) → "step 3 of 10" */
export function t(key, values = {}) {
  return (words[key] ?? key).replace(/\{(\w+)\}/g, (_, name) => values[name]);
}
