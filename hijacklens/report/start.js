"use strict";

const MOST_PRINTED = 100;

(async () => {
  const sheets = [];
  for (const [kind, start] of [["table", startTable], ["facts", startFacts]]) {
    for (const element of document.querySelectorAll(`div.${kind}`)) {
      sheets.push(await start(element));
    }
  }
  for (const button of document.querySelectorAll("button[data-record]")) {
    button.hidden = false;
    button.addEventListener("click", () => {
      const text = document.getElementById(button.dataset.record).textContent;
      download(button.dataset.file, JSON.parse(text), "application/json");
    });
  }
  // Print nothing folded, and tables as long as allowed.
  let opened = [];
  window.addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details:not([open])")];
    for (const fold of opened) fold.open = true;
    for (const sheet of sheets) {
      sheet.left = sheet.page;
      sheet.page = 0;
      sheet.show(MOST_PRINTED);
    }
  });
  window.addEventListener("afterprint", () => {
    for (const fold of opened) fold.open = false;
    for (const sheet of sheets) {
      sheet.page = sheet.left;
      sheet.show();
    }
  });
  document.documentElement.dataset.ready = "true";
})();
