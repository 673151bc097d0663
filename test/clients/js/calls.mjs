// Calls functions of the SDK's client, without a call. Each line of standard input is a JSON array, of the function's name and its
// arguments; each line of standard output is its result, or {"errcode": …, "status": …} if it fails.
//
//   node calls.mjs '{"baseUrl": …, "user": …, "password": …}'

import "./node.mjs";
import { createInterface } from "node:readline";
import { login } from "./login.mjs";
import { say } from "./report.mjs";

const client = await login(JSON.parse(process.argv[2]));
for await (const line of createInterface({ input: process.stdin })) {
  const [name, ...args] = JSON.parse(line);
  await client[name](...args.map((arg) => arg ?? undefined)).then(say, ({ errcode, httpStatus, message }) =>
    say({ errcode, status: httpStatus, message }),
  );
}
process.exit();
