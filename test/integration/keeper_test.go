package integration

import (
	"maps"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"github.com/tidwall/gjson"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/rtc/livekit"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/fakelivekit"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/patience"
)

// The homeserver keeps the timers of participants alive as long as LiveKit says that they are connected.

// call is a room whose users have a call on a LiveKit of the homeserver.
type call struct {
	*server
	liveKit *fakelivekit.Server
	roomID  string
	users   []*user
	delay   time.Duration // of each leave event
	crashes int           // how many there were
}

// participant is a user in a call, who has handed over a leave event.
type participant struct {
	*user
	livekit.Participant
	token, delayID string
}

// onEachCall runs a test with a call on each database. begin starts the server.
func onEachCall(t *testing.T, begin func(*testing.T, homeserver.Config) *server, test func(t *testing.T, c *call)) {
	t.Parallel()
	for _, db := range databases {
		t.Run(db.name, func(t *testing.T) {
			t.Parallel()
			liveKit := startLiveKit(t)
			s := begin(t, homeserver.Config{
				Postgres: db.open(t), WellKnown: true, Expiration: unlimited, MatrixRTC: JSON{"livekit": liveKit.Section("ws://127.0.0.1:1/sfu")},
			})
			c := &call{server: s, liveKit: liveKit, users: []*user{s.newUser(t), s.newUser(t)}}
			c.delay = time.Duration(patience.Life(4)) * time.Second
			c.roomID = s.room(t, c.users...)
			test(t, c)
		})
	}
}

// get asks for a token as Element Call does, and hands over a leave event if there is one.
func (c *call) get(t *testing.T, u *user, delayID string) (p participant) {
	t.Helper()
	body := JSON{"room": c.roomID, "openid_token": u.openID(t), "device_id": "DEV"}
	if delayID != "" {
		body["delay_id"], body["delay_timeout"] = delayID, c.delay.Milliseconds()
	}
	res := u.must(t, http.MethodPost, servicePath+"/sfu/get", body)
	claims, err := fakelivekit.Verify(res.Get("jwt").Str)
	require.NoError(t, err)
	p = participant{user: u, token: res.Get("jwt").Str, delayID: delayID}
	p.Room, p.Identity = claims.Video.Room, claims.Subject
	return p
}

// join has a user join the call, and hand over the leave.
func (c *call) join(t *testing.T, u *user) participant {
	t.Helper()
	require.NoError(t, c.liveKit.Enter(c.get(t, u, "").token))
	key := "_" + u.UserID + "_DEV"
	delayID := u.delayState(t, c.roomID, key, c.delay, JSON{"gone": u.UserID})
	u.must(t, http.MethodPut, homeserver.StatePath(c.roomID, memberType, key), JSON{"in": "the call"})
	return c.get(t, u, delayID)
}

// leaves disconnects a participant. LiveKit's webhook reports it or gets lost.
func (c *call) leaves(t *testing.T, p participant, reported bool) {
	t.Helper()
	c.liveKit.Leave(p.Room, p.Identity)
	if reported {
		c.report(t, "participant_left", p)
	}
}

func (c *call) report(t *testing.T, kind string, p participant) {
	t.Helper()
	code, err := fakelivekit.Report(t.Context(), c.URL+servicePath+"/sfu_webhook", JSON{
		"event": kind, "room": JSON{"name": p.Room}, "participant": JSON{"identity": p.Identity},
	})
	require.NoError(t, err)
	require.Equal(t, http.StatusOK, code)
}

// requireInCall requires that the leave is not sent for some time.
func (c *call) requireInCall(t *testing.T, p participant, long time.Duration) {
	t.Helper()
	for until := time.Now().Add(long); time.Now().Before(until); time.Sleep(pollInterval) {
		require.False(t, p.delayed(t, p.delayID).Get("finalised").Exists())
	}
}

// requireOut requires that the leave is in the room.
func (c *call) requireOut(t *testing.T, p participant) {
	t.Helper()
	var final gjson.Result
	eventuallyWithin(t, c.delay+soon, "the leave is sent", func() bool {
		final = p.delayed(t, p.delayID).Get("finalised")
		return final.Exists()
	})
	require.NotEmpty(t, final.Get("event_id").Str, final)
	require.Equal(t, p.UserID, p.state(t, c.roomID, "_"+p.UserID+"_DEV").Get("content.gone").Str)
}

// Who is connected stays in the call for longer than the delay, also when the homeserver crashes. Who is gone leaves it, even if the webhook
// is lost, or the homeserver is down meanwhile.
func TestKeptAliveByLiveKit(t *testing.T) {
	onEachCall(t, start, func(t *testing.T, c *call) {
		alice, bob := c.join(t, c.users[0]), c.join(t, c.users[1])
		c.requireInCall(t, alice, 2*c.delay)
		c.leaves(t, bob, true)
		c.requireOut(t, bob)
		c.restart(t, true)
		c.requireInCall(t, alice, 2*c.delay)
		c.leaves(t, alice, false)
		c.requireOut(t, alice)

		alice, bob = c.join(t, c.users[0]), c.join(t, c.users[1])
		c.requireInCall(t, bob, c.delay)
		c.Kill()
		c.leaves(t, alice, false)
		require.NoError(t, c.Start(t.Context()))
		c.requireOut(t, alice)
		c.requireInCall(t, bob, c.delay)
	})
}

// Who hands over a leave and never connects leaves when the delay is over.
func TestNeverConnected(t *testing.T) {
	onEachCall(t, start, func(t *testing.T, c *call) {
		u := c.users[0]
		key := "_" + u.UserID + "_DEV"
		c.requireOut(t, c.get(t, u, u.delayState(t, c.roomID, key, c.delay, JSON{"gone": u.UserID})))
	})
}

// A client that comes back, and has forgotten its leave, hands over another one. The older one would throw it out later, so it is cancelled.
func TestNewerLeaveCancelsTheOlder(t *testing.T) {
	onEachCall(t, start, func(t *testing.T, c *call) {
		older := c.join(t, c.users[0])
		newer := c.join(t, c.users[0])
		require.Equal(t, older.Participant, newer.Participant)
		final := older.delayed(t, older.delayID).Get("finalised")
		require.True(t, final.Exists())
		require.False(t, final.Get("event_id").Exists(), final)
		c.requireInCall(t, newer, 2*c.delay)
	})
}

// When LiveKit is started anew, its participants have time to come back. When it stays away, the leaves are sent after the delay.
func TestLiveKitIsAway(t *testing.T) {
	onEachCall(t, start, func(t *testing.T, c *call) {
		alice, bob := c.join(t, c.users[0]), c.join(t, c.users[1])
		c.requireInCall(t, alice, c.delay)
		c.liveKit.Forget()
		eventuallyWithin(t, c.delay+soon, "the homeserver makes the room again", func() bool { return c.liveKit.Enter(alice.token) == nil })
		c.requireOut(t, bob)
		c.requireInCall(t, alice, 2*c.delay)
		c.liveKit.SetAway(true)
		c.requireOut(t, alice)
	})
}

// Who is kicked is removed from LiveKit, and again after coming back with the old token. Others stay.
func TestKickedFromTheCall(t *testing.T) {
	onEachCall(t, start, func(t *testing.T, c *call) {
		alice, bob := c.join(t, c.users[0]), c.join(t, c.users[1])
		away := func() bool { return !c.liveKit.Has(bob.Room, bob.Identity) }
		alice.inRoom(t, c.roomID, "kick", JSON{"user_id": bob.UserID})
		eventually(t, "bob is removed", away)
		require.NoError(t, c.liveKit.Enter(bob.token))
		c.report(t, "participant_joined", bob)
		eventually(t, "bob is removed again", away)
		require.True(t, c.liveKit.Has(alice.Room, alice.Identity))
		res := bob.do(t, http.MethodPost, servicePath+"/sfu/get", JSON{"room": c.roomID, "openid_token": bob.openID(t), "device_id": "DEV"})
		requireRefused(t, res, http.StatusForbidden, "M_FORBIDDEN")

		require.NoError(t, bob.Join(t.Context(), c.roomID))
		bob = c.join(t, bob.user)
		c.report(t, "participant_joined", bob)
		c.requireInCall(t, bob, c.delay)
		require.True(t, c.liveKit.Has(bob.Room, bob.Identity), "bob is back")
	})
}

// An expiring event whose token was handed over runs as long as its sender is connected, without the client's keep-alives, and then ends.
func TestTokenIsHandedOver(t *testing.T) {
	onEachCall(t, start, func(t *testing.T, c *call) {
		u := c.users[0]
		const life = 10
		p := c.get(t, u, "")
		require.NoError(t, c.liveKit.Enter(p.token))
		e := u.sendState(t, c.roomID, "_"+u.UserID+"_DEV", life, JSON{})
		res := u.do(t, http.MethodPut, delegatePath, JSON{"expire_refresh_token": e.token, "device_id": "DEV"})
		require.Equal(t, http.StatusOK, res.Code, res)
		require.Equal(t, "{}", res.Get("@this").Raw)
		running := func() bool { return len(u.closings(t, c.roomID, e.eventID)) == 0 }
		for until := time.Now().Add(1.5 * life * time.Second); time.Now().Before(until); time.Sleep(time.Second) {
			require.True(t, running())
		}
		c.restart(t, true)
		require.True(t, running())
		c.leaves(t, p, true)
		eventuallyWithin(t, life*time.Second+soon, "the event ends", func() bool { return !running() })
		require.Equal(t, "ended", u.closings(t, c.roomID, e.eventID)[0].Get(`content.m\.will_expire`).Str)
	})
}

const delegatePath = "/_matrix/client/v3/expiration/delegate"

// Whatever is wrong with a request that hands something over, its error is that of docs/calls-api.md.
func TestBadDelegations(t *testing.T) {
	onEachCall(t, start, func(t *testing.T, c *call) {
		alice, bob := c.users[0], c.users[1]
		stranger, other := c.newUser(t), c.room(t, alice)
		const hour = time.Hour
		scheduled := alice.delayState(t, c.roomID, "key", hour, JSON{})
		sent := alice.delayState(t, c.roomID, "key", hour, JSON{"is": "sent"})
		alice.acted(t, stableDelayed, sent, "send")
		with := func(body JSON, changes JSON) JSON {
			body = maps.Clone(body)
			for key, value := range changes {
				body[key] = value
				if value == nil {
					delete(body, key)
				}
			}
			return body
		}
		leave := JSON{"url": "ws://127.0.0.1:1/sfu", "room_id": c.roomID, "slot_id": slotID, "member_id": "abc", "delay_id": scheduled}
		for _, path := range tokenPathsEndingIn("/rtc/livekit/delegate_delayed_leave") {
			for name, test := range map[string]struct {
				who     *user
				body    any
				status  int
				errcode string
			}{
				"unknown ID":      {alice, with(leave, JSON{"delay_id": "unknown"}), 400, "M_INVALID_PARAM"},
				"sent already":    {alice, with(leave, JSON{"delay_id": sent}), 400, "M_INVALID_PARAM"},
				"another user's":  {bob, leave, 400, "M_INVALID_PARAM"},
				"another room":    {alice, with(leave, JSON{"room_id": other}), 400, "M_INVALID_PARAM"},
				"another SFU":     {alice, with(leave, JSON{"url": "wss://elsewhere.example"}), 400, "M_INVALID_PARAM"},
				"not joined":      {stranger, leave, 403, "M_FORBIDDEN"},
				"no room":         {alice, with(leave, JSON{"room_id": "!none:localhost"}), 403, "M_FORBIDDEN"},
				"no ID":           {alice, with(leave, JSON{"delay_id": nil}), 400, "M_MISSING_PARAM"},
				"no member":       {alice, with(leave, JSON{"member_id": nil}), 400, "M_MISSING_PARAM"},
				"ID is a number":  {alice, with(leave, JSON{"delay_id": 1}), 400, "M_BAD_JSON"},
				"no JSON":         {alice, []byte("no"), 400, "M_NOT_JSON"},
				"no access token": {&user{c.Anonymous(), c.server}, leave, 401, "M_MISSING_TOKEN"},
			} {
				requireRefused(t, test.who.do(t, http.MethodPost, path, test.body), test.status, test.errcode)
				require.Equal(t, []string{scheduled}, alice.scheduled(t), name)
			}
			res := alice.do(t, http.MethodPost, path, leave)
			require.Equal(t, http.StatusOK, res.Code, res)
			require.Equal(t, "{}", res.Get("@this").Raw)
		}

		e, short := alice.sendState(t, c.roomID, "e", 3600, JSON{}), alice.sendState(t, c.roomID, "short", 9, JSON{})
		token := JSON{"expire_refresh_token": e.token, "slot_id": slotID, "member_id": "abc"}
		for name, test := range map[string]struct {
			body    any
			status  int
			errcode string
		}{
			"unknown token":     {with(token, JSON{"expire_refresh_token": "unknown"}), 404, "M_NOT_FOUND"},
			"another SFU":       {with(token, JSON{"url": "wss://elsewhere.example"}), 400, "M_INVALID_PARAM"},
			"too short":         {with(token, JSON{"expire_refresh_token": short.token}), 400, "M_INVALID_PARAM"},
			"no token":          {with(token, JSON{"expire_refresh_token": nil}), 400, "M_MISSING_PARAM"},
			"nobody":            {with(token, JSON{"member_id": nil}), 400, "M_MISSING_PARAM"},
			"no slot":           {with(token, JSON{"slot_id": nil}), 400, "M_MISSING_PARAM"},
			"member is a map":   {with(token, JSON{"member_id": JSON{}}), 400, "M_BAD_JSON"},
			"token is a number": {with(token, JSON{"expire_refresh_token": 1}), 400, "M_BAD_JSON"},
			"no JSON":           {[]byte("no"), 400, "M_NOT_JSON"},
			"too large":         {with(token, JSON{"x": strings.Repeat("x", 4<<10)}), 413, "M_TOO_LARGE"},
		} {
			res := alice.do(t, http.MethodPut, delegatePath, test.body)
			require.Equal(t, test.status, res.Code, "%s: %s", name, res)
			require.Equal(t, test.errcode, res.Get("errcode").Str, name)
		}
		anybody := &user{c.Anonymous(), c.server}
		require.Equal(t, http.StatusOK, anybody.do(t, http.MethodPut, delegatePath, token).Code, "the token is the authority")
		ended, err := anybody.KeepAlive(t.Context(), "end", e.token)
		require.NoError(t, err)
		require.Equal(t, http.StatusOK, ended.Code)
		requireRefused(t, anybody.do(t, http.MethodPut, delegatePath, token), http.StatusNotFound, "M_NOT_FOUND")
	})
}
