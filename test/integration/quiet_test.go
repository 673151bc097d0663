//go:build all

package integration

import (
	"net/http"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
)

// Dendrite ends the worker of a room after a minute without events. In the last five seconds of that minute the worker takes nothing from
// its queue: it is deaf. An event of another server that arrives then stays in the queue. The times are Dendrite's.
const (
	deafAfter = 55 * time.Second
	deafUntil = 60 * time.Second
	// seenWithin limits how long an event of another server may stay in the queue, as docs/protocol.md promises.
	seenWithin = 8 * time.Second
)

// quietCase is one room without events, until a moderator of the far server acts. The result arrives while the room's worker is deaf.
type quietCase struct {
	name string
	// life is the life time of the near server's event, or its delay.
	life time.Duration
	// begin sends or schedules that event, as the last event of the room.
	begin func(t *testing.T, c *quietCase)
	// act is the action of the far server's user.
	act func(t *testing.T, c *quietCase)
	// seen reports whether the near server has noticed the action; nil if only the outcome at the deadline matters.
	seen func(t *testing.T, c *quietCase) bool
	// end means that the test ends the event after the action has arrived.
	end bool
	// judge checks the outcome at the end.
	judge func(t *testing.T, c *quietCase)

	p      *pair
	user   *user // a user of the near server
	roomID string
	sent   sent
	delay  string // the delay ID
	newer  string // the event ID of the far user's event
}

const (
	// These times count from the last event of the room. actsAt is when the far user acts, and arrivesAt when the action arrives. dueAt is
	// when the near server's event is due, while the worker is still deaf.
	actsAt    = deafAfter - 8*time.Second
	arrivesAt = deafAfter + 500*time.Millisecond
	dueAt     = deafUntil - time.Second
	notDue    = 10 * time.Minute
)

// Actions of another server's users in a quiet room take effect, even if they arrive while the worker is deaf. The near server notices
// them soon. It sends no event that ignores an action still in the queue.
func TestFederationQuietRooms(t *testing.T) {
	t.Parallel()
	onEachPair(t, func(t *testing.T, p *pair) {
		cases := quietCases()
		for _, c := range cases {
			c.p, c.user, c.roomID = p, p.near.newUser(t), p.newRoom(t, p.alice, p.carol)
			require.NoError(t, c.user.Join(t.Context(), c.roomID))
			c.user.arrived(t, c.roomID, p.carol)
			p.carol.arrived(t, c.roomID, c.user)
		}
		began, busy := beginTogether(t, cases)
		waitUntil(began.Add(actsAt))
		p.gate.Hold()
		for _, c := range cases {
			c.act(t, c)
		}
		waitUntil(began.Add(busy + arrivesAt))
		p.gate.Release()
		for _, c := range cases {
			eventually(t, "the event has arrived", func() bool { return p.near.queued(t, c.roomID) })
		}
		arrived := time.Now()
		require.Less(t, arrived.Sub(began), dueAt, "the machine is too busy: what has arrived is due already")
		var all sync.WaitGroup
		for _, c := range cases {
			if c.end {
				all.Go(func() {
					code, errcode := p.near.keepAlive(t, "end", c.sent.token)
					assert.Equal(t, http.StatusNotFound, code, "%s: %s", c.name, errcode)
					t.Logf("%s: answered after %v", c.name, time.Since(arrived))
				})
			}
			if c.seen != nil {
				all.Go(func() {
					for !c.seen(t, c) && time.Since(arrived) < 2*seenWithin {
						time.Sleep(50 * time.Millisecond)
					}
					assert.Less(t, time.Since(arrived), seenWithin, c.name)
					t.Logf("%s: seen after %v", c.name, time.Since(arrived))
				})
			}
		}
		all.Wait()
		waitUntil(arrived.Add(seenWithin))
		for _, c := range cases {
			t.Run(c.name, func(t *testing.T) { c.judge(t, c) })
		}
	})
}

// queued reports whether the roomserver's queue of a room has events.
func (s *server) queued(t *testing.T, roomID string) bool {
	t.Helper()
	res, err := s.Anonymous().Do(t.Context(), http.MethodGet, "/metrics", nil)
	require.NoError(t, err)
	for line := range strings.Lines(string(res.Body)) {
		if rest, ok := strings.CutPrefix(line, `dendrite_roomserver_input_backpressure{room_id="`+roomID+`"} `); ok {
			return strings.TrimSpace(rest) != "0"
		}
	}
	return false
}

// beginTogether begins all cases within such a short time that all rooms are deaf at the same time. It returns the start, and how long it
// took.
func beginTogether(t *testing.T, cases []*quietCase) (began time.Time, took time.Duration) {
	t.Helper()
	for range 10 {
		var all sync.WaitGroup
		began = time.Now()
		for _, c := range cases {
			all.Go(func() { c.begin(t, c) })
		}
		all.Wait()
		if took = time.Since(began); took < 2*time.Second || t.Failed() {
			return began, took
		}
		for _, c := range cases { // try again
			if c.sent.token != "" {
				c.p.near.keepAlive(t, "end", c.sent.token)
			}
			if c.delay != "" {
				c.user.acted(t, unstableDelayed, c.delay, "cancel")
			}
		}
	}
	t.Fatal("the machine is too busy: the last rooms are not deaf yet when the first are")
	return began, took
}

func waitUntil(at time.Time) { <-time.After(time.Until(at)) }

func quietCases() []*quietCase {
	return []*quietCase{
		{name: "Replaced", life: dueAt, begin: beginState, act: replace, judge: newerStands},
		{name: "ReplacedBeforeItIsDue", life: notDue, begin: beginState, act: replace, seen: replaced, judge: newerStands},
		{name: "ReplacedAndEnded", life: notDue, begin: beginState, act: replace, end: true, judge: newerStands},
		{name: "Redacted", life: dueAt, begin: beginState, act: redact, judge: secretIsGone},
		{name: "MessageRedacted", life: dueAt, begin: func(t *testing.T, c *quietCase) {
			c.sent = c.user.sendMessage(t, c.roomID, int(c.life.Seconds()))
		}, act: redact, judge: notClosed},
		{name: "Kicked", life: dueAt, begin: beginState, act: func(t *testing.T, c *quietCase) {
			c.p.carol.must(t, http.MethodPost, roomPath(c.roomID)+"/kick", JSON{"user_id": c.user.UserID})
		}, judge: notClosed},
		{name: "DelayedAndStateOfTheOther", life: dueAt, begin: func(t *testing.T, c *quietCase) {
			c.delay = c.user.delayState(t, c.roomID, "key", c.life, JSON{"body": "delayed"})
			c.user.must(t, http.MethodPut, homeserver.SendPath(c.roomID, "org.example.last"), JSON{})
		}, act: replace, judge: func(t *testing.T, c *quietCase) {
			// It is built upon the other's state, and therefore replaces that on both servers.
			c.newer = c.user.finalised(t, c.delay).Get("event_id").Str
			requireState(t, c)
		}},
	}
}

func beginState(t *testing.T, c *quietCase) {
	c.sent = c.user.sendState(t, c.roomID, "key", int(c.life.Seconds()), JSON{"secret": 1})
}

func replace(t *testing.T, c *quietCase) {
	c.newer = c.p.carol.must(t, http.MethodPut, homeserver.StatePath(c.roomID, memberType, "key"), JSON{"body": "carol's"}).Get("event_id").Str
}

func redact(t *testing.T, c *quietCase) {
	c.p.carol.must(t, http.MethodPut, roomPath(c.roomID)+"/redact/"+url.PathEscape(c.sent.eventID)+"/1", JSON{})
}

func replaced(t *testing.T, c *quietCase) bool {
	return c.p.alice.state(t, c.roomID, "key").Get("event_id").Str == c.newer
}

// requireState requires that the far user's event is the current state on both servers.
func requireState(t *testing.T, c *quietCase) {
	t.Helper()
	for _, u := range []*user{c.p.alice, c.p.carol} {
		eventually(t, "both servers have the newer state", func() bool {
			return c.newer == u.state(t, c.roomID, "key").Get("event_id").Str
		})
	}
}

func newerStands(t *testing.T, c *quietCase) {
	notClosed(t, c)
	requireState(t, c)
}

func secretIsGone(t *testing.T, c *quietCase) {
	notClosed(t, c)
	for _, u := range []*user{c.p.alice, c.p.carol} {
		require.False(t, u.state(t, c.roomID, "key").Get("content.secret").Exists())
	}
}

// notClosed requires that neither server has a closing event, and that the token is refused.
func notClosed(t *testing.T, c *quietCase) {
	t.Helper()
	c.p.near.refused(t, c.sent.token)
	require.Empty(t, c.p.alice.closings(t, c.roomID, c.sent.eventID))
	c.p.alice.arrived(t, c.roomID, c.p.carol)
	require.Empty(t, c.p.carol.closings(t, c.roomID, c.sent.eventID))
}

func roomPath(roomID string) string { return "/_matrix/client/v3/rooms/" + url.PathEscape(roomID) }

// Events in a quiet room are closed in time. In the last five seconds of a minute without events, Dendrite's worker takes nothing from the
// room's queue, and then ends. A closing event that arrives then must not wait for the room's next event.
func TestQuietRooms(t *testing.T) {
	t.Parallel()
	s := start(t, homeserver.Config{Postgres: databases[0].open(t), Expiration: unlimited})
	alice := s.newUser(t)
	due := map[string]time.Time{} // by room
	for seconds := 55; seconds <= 60; seconds++ {
		roomID := s.room(t, alice)
		alice.sendState(t, roomID, "quiet", seconds, nil)
		due[roomID] = time.Now().Add(time.Duration(seconds) * time.Second)
	}
	for roomID, due := range due {
		<-time.After(time.Until(due))
		eventuallyWithin(t, time.Until(due.Add(min(soon, 2*time.Minute))), "the closing event of a quiet room", func() bool {
			return alice.state(t, roomID, "quiet").Get(`content.m\.will_expire`).Str == "expired"
		})
	}
}
