// Controls one user's Chromium and uses Element Call in it, as the test commands.
//
//   node driver.mjs ws://127.0.0.1:PORT/… FAILURE.png
//
// A command is a line on standard input, ["name", arguments…]. Its answer is a line on standard output, {"result": …} or
// {"error": "…"}. After an error FAILURE.png shows the page. The page's console goes to standard error.

import { createInterface } from "node:readline";
import { chromium } from "playwright-core";

const browser = await chromium.connectOverCDP(process.argv[2]);
const page = browser.contexts()[0].pages()[0];
page.setDefaultTimeout(100_000);
page.on("console", (message) => console.error(new Date().toISOString(), message.text()));
page.on("pageerror", (error) => console.error(new Date().toISOString(), error));

const field = (id) => page.getByTestId(id);

// tiles and pixels run in the page. tiles returns the shown users and their elements, and pixels what an element shows.
await page.addInitScript(() => {
  window.tiles = () =>
    [...document.querySelectorAll("[data-testid=videoTile]")].map((tile) => ({
      // The avatar, which also exists behind a video, is labelled with the user ID.
      user: tile.querySelector("[role=img][aria-label^='@']")?.getAttribute("aria-label") ?? "",
      video: tile.querySelector("video"),
    }));
  window.pixels = (video) => {
    const canvas = document.createElement("canvas");
    canvas.width = canvas.height = 64;
    const context = canvas.getContext("2d");
    context.drawImage(video, 0, 0, 64, 64);
    return context.getImageData(0, 0, 64, 64).data.join();
  };
});

const commands = {
  // An account logs in.
  async login(url, user, password) {
    await page.goto(url + "/login");
    await field("login_username").fill(user);
    await field("login_password").fill(password);
    await field("login_login").click();
    await field("home_callName").waitFor();
  },

  // Begins a call, up to the lobby, and returns the link to it. A user without an account enters a name.
  async begin(url, call, name) {
    await page.goto(url);
    await field("home_callName").fill(call);
    if (name) await field("home_displayName").fill(name);
    await field("home_go").click();
    await field("lobby_joinCall").waitFor();
    return page.url();
  },

  // Follows the link to a call, up to the lobby.
  async follow(link, name) {
    await page.goto(link);
    if (name) {
      await field("joincall_displayName").fill(name);
      await field("joincall_joincall").click();
    }
    await field("lobby_joinCall").waitFor();
  },

  // Joins the call, and returns this user's ID.
  async join() {
    await field("lobby_joinCall").click();
    await field("incall_leave").waitFor();
    return page.evaluate(() => JSON.parse(localStorage.getItem("matrix-auth-store")).user_id);
  },

  // Leaves the call.
  leave: () => field("incall_leave").click(),

  // Waits until a user's video is shown and moves.
  async sees(user) {
    await page.evaluate(() => (window.before = undefined));
    await page.waitForFunction(
      (user) => {
        const video = window.tiles().find((tile) => tile.user === user)?.video;
        if (!video || !(video.currentTime > 0)) return false;
        const now = { time: video.currentTime, pixels: window.pixels(video) };
        window.before ??= now;
        return now.time > window.before.time && now.pixels !== window.before.pixels;
      },
      user,
      { polling: 300 },
    );
  },

  // Waits until a user is no longer shown.
  misses: (user) => page.waitForFunction((user) => window.tiles().every((tile) => tile.user !== user), user, { polling: 50 }),

  // Returns the user ID of each shown tile. A user with two tiles is listed twice.
  shown: () => page.evaluate(() => window.tiles().map((tile) => tile.user)),

  // Records the greatest number of tiles that a user has at one time.
  watch: (user) =>
    page.evaluate((user) => {
      window.most = 0;
      const count = () => (window.most = Math.max(window.most, window.tiles().filter((tile) => tile.user === user).length));
      new MutationObserver(count).observe(document.body, { childList: true, subtree: true, characterData: true });
      count();
    }, user),
  most: () => page.evaluate(() => window.most),

  picture: (path) => page.screenshot({ path }),
};

for await (const line of createInterface({ input: process.stdin })) {
  const [name, ...args] = JSON.parse(line);
  let answer;
  try {
    const result = await commands[name](...args);
    answer = { result: typeof result === "object" && !Array.isArray(result) ? null : result };
  } catch (error) {
    await page.screenshot({ path: process.argv[3] }).catch(console.error);
    answer = { error: String(error) };
  }
  process.stdout.write(JSON.stringify(answer) + "\n");
}
process.exit();
