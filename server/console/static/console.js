// Follows a forget request that is being carried out. Without scripts the page loads itself anew instead.
"use strict";
const shown = document.getElementById("progress");

async function follow() {
  const request = shown.querySelector("#request");
  if (request.dataset.state !== "accepted") return;
  try {
    const answer = await fetch(request.dataset.part, { credentials: "same-origin", redirect: "error" });
    if (answer.ok) {
      const text = await answer.text();
      // What has not changed is left alone, so that nobody hears it read out again.
      const next = new DOMParser().parseFromString(text, "text/html").querySelector("#request");
      if (next && next.textContent !== request.textContent) request.replaceWith(next);
    }
  } catch {
    // The service may be starting again; the next turn asks once more.
  }
  setTimeout(follow, 1000);
}

if (shown) setTimeout(follow, 1000);
