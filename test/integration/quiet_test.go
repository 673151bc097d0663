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

// Dendrite ends the worker of a room in which nothing happened for a minute, and for the last five seconds of that minute the
// worker takes nothing from its queue any more. What another server sends just then lies there. These are Dendrite's figures.
const (
	deafAfter = 55 * time.Second
	deafUntil = 60 * time.Second
	// seenWithin is how long an event of another server may lie in the queue, as docs/protocol.md promises.
	seenWithin = 8 * time.Second
)

// quietCase is one room that is quiet, until a moderator of the far server does something that arrives while the room's worker
// is deaf.
type quietCase struct {
	name string
	// life is how long the near server's event runs, or how long it is delayed.
	life time.Duration
	// begin sends or schedules it, as the last thing that happens in the room.
	begin func(t *testing.T, c *quietCase)
	// act is what the far server's user does.
	act func(t *testing.T, c *quietCase)
	// seen reports whether the near server knows of it; nil if what happens at the deadline is looked at alone.
	seen func(t *testing.T, c *quietCase) bool
	// end: the token is used to end the event when that has arrived.
	end bool
	// judge looks at the outcome, when all is over.
	judge func(t *testing.T, c *quietCase)

	p      *pair
	user   *user // of the near server
	roomID string
	sent   sent
	delay  string // the delay ID
	newer  string // the far user's event
}

const (
	// actsAt and arrivesAt are when the far server's user does it, and when it arrives, after the last event of the room; dueAt
	// is when the near server's event is due: the worker is still deaf.
	actsAt    = deafAfter - 8*time.Second
	arrivesAt = deafAfter + 500*time.Millisecond
	dueAt     = deafUntil - time.Second
	notDue    = 10 * time.Minute
)

// What another server's users do in a quiet room counts, also if it arrives in the moment in which nobody listens: it is seen
// soon, and nothing is sent on top of what the room does not yet know.
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

// queued reports whether something lies in the roomserver's queue for a room.
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

// beginTogether begins all cases within so short a time that all rooms are deaf together, and returns when and how long it took.
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
		for _, c := range cases { // anew
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
		{name: "DelayedAndReplaced", life: dueAt, begin: func(t *testing.T, c *quietCase) {
			c.delay = c.user.delayState(t, c.roomID, "key", c.life, JSON{"body": "delayed"})
			c.user.must(t, http.MethodPut, homeserver.SendPath(c.roomID, "org.example.last"), JSON{})
		}, act: replace, judge: func(t *testing.T, c *quietCase) {
			final := c.user.finalised(t, c.delay)
			require.False(t, final.Get("event_id").Exists(), final)
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
		require.Equal(t, c.newer, u.state(t, c.roomID, "key").Get("event_id").Str)
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

// notClosed requires that neither server has a closing event, and that the timer is gone.
func notClosed(t *testing.T, c *quietCase) {
	t.Helper()
	c.p.near.refused(t, c.sent.token)
	require.Empty(t, c.p.alice.closings(t, c.roomID, c.sent.eventID))
	c.p.alice.arrived(t, c.roomID, c.p.carol)
	require.Empty(t, c.p.carol.closings(t, c.roomID, c.sent.eventID))
}

func roomPath(roomID string) string { return "/_matrix/client/v3/rooms/" + url.PathEscape(roomID) }

// A room in which nothing else happens is closed in time too. Dendrite's worker for a room takes nothing in the last five
// seconds of a minute without work, before it ends; what comes then must not wait until somebody says something.
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
