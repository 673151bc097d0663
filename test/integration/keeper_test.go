package integration

import (
	"net/http"
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

// onEachCall runs a test with a call on each database.
func onEachCall(t *testing.T, test func(t *testing.T, c *call)) {
	t.Parallel()
	for _, db := range databases {
		t.Run(db.name, func(t *testing.T) {
			t.Parallel()
			liveKit := startLiveKit(t)
			s := start(t, homeserver.Config{
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
	onEachCall(t, func(t *testing.T, c *call) {
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
	onEachCall(t, func(t *testing.T, c *call) {
		u := c.users[0]
		key := "_" + u.UserID + "_DEV"
		c.requireOut(t, c.get(t, u, u.delayState(t, c.roomID, key, c.delay, JSON{"gone": u.UserID})))
	})
}

// When LiveKit is started anew, its participants have time to come back. When it stays away, the leaves are sent after the delay.
func TestLiveKitIsAway(t *testing.T) {
	onEachCall(t, func(t *testing.T, c *call) {
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
	onEachCall(t, func(t *testing.T, c *call) {
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
