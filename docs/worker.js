// Browsers start no workers for pages from a disk: there, search runs in a frame of the page instead.
"use strict";
if (location.protocol === "file:") window.Worker = class extends EventTarget {
  constructor(url) {
    super();
    const frame = document.createElement("iframe");
    frame.hidden = true;
    document.body.append(frame);
    this.inner = frame.contentWindow;
    this.inner.postMessage = data => this.dispatchEvent(new MessageEvent("message", {data}));
    this.ready = new Promise((done, failed) => {
      const script = this.inner.document.createElement("script");
      Object.assign(script, {src: url, onload: done, onerror: failed});
      this.inner.document.head.append(script);
    });
  }
  postMessage(data) {
    this.ready.then(() => this.inner.dispatchEvent(new MessageEvent("message", {data})));
  }
};
