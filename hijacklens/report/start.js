"use strict";

(async () => {
  for (const [kind, start] of [["table", startTable], ["facts", startFacts]]) {
    for (const element of document.querySelectorAll(`div.${kind}`)) {
      await start(element);
    }
  }
  for (const button of document.querySelectorAll("button[data-record]")) {
    button.hidden = false;
    button.addEventListener("click", () => {
      const text = document.getElementById(button.dataset.record).textContent;
      download(button.dataset.file, JSON.parse(text), "application/json");
    });
  }
  document.documentElement.dataset.ready = "true";
})();
