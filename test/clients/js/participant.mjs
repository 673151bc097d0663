// A participant in a call, like Element Call but without media. It logs in, joins the MatrixRTC session of a room, and keeps its
// membership there until it reads "leave" on standard input, or standard input is closed.
//
//   node participant.mjs '{"baseUrl": …, "user": …, "password": …, "roomId": …, "config": …}'
//
// It reports events on standard output, one JSON object a line:
//
//   {"members": ["@alice:localhost"]}          the members of the call have changed
//   {"request": "restart", "status": 200}      a request about its membership was answered, see report.mjs
//   {"sync": "SYNCING"}                        the state of the connection to the server has changed
//   {"error": "…"}                             the session has failed

import "./node.mjs";
import { once } from "node:events";
import { createInterface } from "node:readline";
import { ClientEvent } from "matrix-js-sdk";
import { MatrixRTCSessionEvent } from "matrix-js-sdk/lib/matrixrtc/index.js";
import { login } from "./login.mjs";
import { fetchFn, say } from "./report.mjs";

async function join(client, { roomId, config }) {
  const session = client.matrixRTC.getRoomSession(client.getRoom(roomId));
  await session.initialMembershipCalculated;
  session.on(MatrixRTCSessionEvent.MembershipsChanged, (_, memberships) =>
    say({ members: memberships.map((membership) => membership.userId).sort() }),
  );
  session.on(MatrixRTCSessionEvent.MembershipManagerError, (error) => say({ error: String(error) }));
  const [userId, deviceId] = [client.getUserId(), client.getDeviceId()];
  // No request reaches this SFU, because there is no media.
  const focus = { type: "livekit", livekit_service_url: "https://sfu.invalid", livekit_alias: roomId };
  session.joinRTCSession({ userId, deviceId, memberId: `${userId}:${deviceId}` }, [focus], undefined, config);
  return session;
}

const options = JSON.parse(process.argv[2]);
const client = await login(options, fetchFn);
client.on(ClientEvent.Sync, (sync, before) => sync === before || say({ sync }));
await client.startClient();
while (!client.isInitialSyncComplete()) await once(client, ClientEvent.Sync);
const session = await join(client, options);
for await (const command of createInterface({ input: process.stdin })) {
  if (command === "leave") await session.leaveRoomSession();
}
process.exit();
