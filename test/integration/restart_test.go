package integration

import (
	"net/http"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/failpoint"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/patience"
)

// docs/protocol.md, section 5: durability.

// afterCrash is how long it can take after a crash until clients see all events of the roomserver. JetStream redelivers a message that was
// not acknowledged after 30 seconds.
var afterCrash = 30*time.Second + soon

// afterQueue is how long it can take after a crash until the roomserver has processed its queue. JetStream redelivers the unfinished
// messages after 5 minutes and 10 seconds. Until then a room's state can have regressed.
var afterQueue = 5*time.Minute + 10*time.Second + afterCrash

func TestRestart(t *testing.T) {
	t.Parallel()
	for name, crash := range map[string]bool{"SIGTERM": false, "SIGKILL": true} {
		t.Run(name, func(t *testing.T) {
			onEachDatabase(t, unlimited, func(t *testing.T, s *server) {
				life := patience.Life(5)
				alice := s.newUser(t)
				roomID, other := s.room(t, alice), s.room(t, alice)
				running := alice.sendState(t, roomID, "running", 600, nil)
				var overdue []string
				for range 5 {
					overdue = append(overdue, alice.sendMessage(t, roomID, patience.Life(2)).eventID)
				}
				alice.sendMessage(t, other, patience.Life(2))
				replaced := alice.sendState(t, roomID, "replaced", 600, nil)
				alice.must(t, http.MethodPut, homeserver.StatePath(roomID, memberType, "replaced"), JSON{"left": true})
				ended := alice.sendState(t, roomID, "ended", 600, nil)
				code, _ := s.keepAlive(t, "end", ended.token)
				require.Equal(t, http.StatusOK, code)
				held := alice.sendState(t, roomID, "held", life, nil)
				s.refreshed(t, held.token)
				refreshed := time.Now()
				s.restart(t, crash)

				// The refresh was right before the crash, and counts.
				s.refreshed(t, running.token)
				s.refused(t, replaced.token)
				s.refused(t, ended.token)
				follower := alice.follow(t, roomID)
				follower.patience = afterQueue // the server may have been closing one of them when it ended
				for _, eventID := range overdue {
					follower.awaitClosing(t, eventID, "expired")
				}
				closing := follower.awaitClosing(t, held.eventID, "expired")
				require.GreaterOrEqual(t, closing.Get("origin_server_ts").Int(), refreshed.Add(time.Duration(life)*time.Second-100*time.Millisecond).UnixMilli(), "early")

				var order []string
				for _, e := range alice.timeline(t, roomID) {
					if closes := e.Get(`content.m\.relates_to.event_id`).Str; e.Get("type").Str == "m.room.message" && closes != "" {
						order = append(order, closes)
					}
				}
				require.Equal(t, overdue, order, "in the order of their deadlines, each once")
				require.Equal(t, "ended", alice.state(t, roomID, "ended").Get(`content.m\.will_expire`).Str)
				eventuallyWithin(t, afterCrash, "the event that was ended", func() bool {
					return len(alice.closings(t, roomID, ended.eventID)) == 1
				})
				require.Empty(t, alice.closings(t, roomID, running.eventID))
				require.Empty(t, alice.closings(t, roomID, replaced.eventID))
				eventually(t, "nothing else is left", func() bool { return s.metric(t, "dendrite_expiration_running_timers") == 1 })

				// The client repeats its request, because it does not know whether the server has handled it.
				require.Equal(t, running, alice.sendState(t, roomID, "running", 600, nil))
			})
		})
	}
}

// The server answers a send before it finds out which timers the new state replaces. If the server crashes in between, and the output
// stream does not report the state, the old token is refused all the same.
func TestReplacedBeforeTheCrash(t *testing.T) {
	t.Parallel()
	for _, db := range databases {
		t.Run(db.name, func(t *testing.T) {
			t.Parallel()
			s := startWithFailpoints(t, homeserver.Config{Postgres: db.open(t), Expiration: unlimited})
			alice := s.newUser(t)
			roomID := s.room(t, alice)
			require.NoError(t, s.Failpoints(string(failpoint.Stream)+" hold"))
			other := alice.sendState(t, roomID, "other", 600, nil)
			byPlain, byExpiring := alice.sendState(t, roomID, "plain", 600, nil), alice.sendState(t, roomID, "expiring", 600, nil)
			now := alice.sendState(t, roomID, "expiring", 600, JSON{"again": true})
			alice.must(t, http.MethodPut, homeserver.StatePath(roomID, memberType, "plain"), JSON{"left": true})
			s.restart(t, true)
			s.refused(t, byPlain.token)
			s.refused(t, byExpiring.token)
			s.refreshed(t, other.token)
			s.refreshed(t, now.token)
			require.NoError(t, s.Failpoints()) // otherwise the server would not stop
		})
	}
}

func TestRestartGrace(t *testing.T) {
	t.Parallel()
	grace := time.Duration(patience.Life(4)) * time.Second
	onEachDatabase(t, JSON{"restart_grace": grace.String(), "rate_limiting": JSON{"enabled": false}}, func(t *testing.T, s *server) {
		alice := s.newUser(t)
		roomID := s.room(t, alice)
		life := patience.Life(2) // long enough to kill the server first
		live, dead := alice.sendState(t, roomID, "live", 3*life, nil), alice.sendState(t, roomID, "dead", life, nil)
		s.Kill()
		<-time.After(time.Duration(life)*time.Second + 100*time.Millisecond)
		before := time.Now()
		require.NoError(t, s.Start(t.Context()))
		s.refreshed(t, live.token)
		closing := alice.follow(t, roomID).awaitClosing(t, dead.eventID, "expired")
		require.GreaterOrEqual(t, closing.Get("origin_server_ts").Int(), before.Add(grace).UnixMilli())
		s.refreshed(t, live.token)
	})
}
