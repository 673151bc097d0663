package integration

import (
	"bytes"
	"net/http"
	"net/url"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
)

// A panic in the middle of Dendrite, while an event is sent that is due, ends neither the process nor anybody else's timer, and
// the event is given up after a few attempts.
func TestPanicsWhenDue(t *testing.T) {
	for _, db := range databases {
		t.Run(db.name, func(t *testing.T) {
			t.Parallel()
			s := startWithFailpoints(t, homeserver.Config{Postgres: db.open(t), Expiration: unlimited})
			alice := s.newUser(t)
			room := s.room(t, alice)
			e := alice.sendState(t, room, "bad", 2, nil)
			delayID := alice.delayMessage(t, room, 2*time.Second, "bad")
			require.NoError(t, s.Failpoints("before-input panic"))
			eventually(t, "the delayed event is finalised", func() bool {
				return alice.delayed(t, delayID).Get("error.errcode").Exists()
			})
			eventually(t, "the timer is dropped", func() bool { return s.metric(t, "dendrite_expiration_drops_total", `reason="unsendable"`) == 1 })
			s.refused(t, e.token)
			require.NoError(t, s.Failpoints(""))
			follower := alice.follow(t, room)
			good := alice.sendState(t, room, "good", 1, nil)
			follower.awaitClosing(t, good.eventID, "expired")
			written, err := s.Written()
			require.NoError(t, err)
			require.Positive(t, bytes.Count(written, []byte("Sending an event panicked")))
		})
	}
}

// An expiring event that fitted when it was sent, and does not when it is closed, is dropped, and whoever ends it is told so.
func TestRefusedWhenDue(t *testing.T) {
	onEachDatabase(t, unlimited, func(t *testing.T, s *server) {
		alice := s.newUser(t)
		room := s.room(t, alice)
		alias := func(name string) string {
			alias := "#" + name + ":" + s.Name
			alice.must(t, http.MethodPut, "/_matrix/client/v3/directory/room/"+url.PathEscape(alias), JSON{"room_id": room})
			return alias
		}
		main := alias("main")
		send := func(seconds int, other string) sent {
			return sentBy(t, alice.must(t, http.MethodPut, homeserver.StatePath(room, "m.room.canonical_alias", ""),
				JSON{"m.will_expire": seconds, "alias": main, "alt_aliases": []string{alias(other)}}))
		}
		remove := func(other string) {
			alice.must(t, http.MethodDelete, "/_matrix/client/v3/directory/room/"+url.PathEscape("#"+other+":"+s.Name), nil)
		}
		ended := send(3600, "ended")
		remove("ended")
		code, errcode := s.keepAlive(t, "end", ended.token)
		require.Equal(t, http.StatusForbidden, code)
		require.Equal(t, "M_FORBIDDEN", errcode)
		s.refused(t, ended.token)

		expired := send(1, "expired")
		remove("expired")
		eventually(t, "the timer is dropped", func() bool { return s.metric(t, "dendrite_expiration_drops_total", `reason="forbidden"`) == 2 })
		s.refused(t, expired.token)
		require.Empty(t, alice.closings(t, room, expired.eventID))
	})
}

// A 200 of /end, or of send, means that the event is in the room, also when its sender leaves or is kicked at the same moment.
func TestEndWhileTheSenderLeaves(t *testing.T) {
	onEachDatabase(t, map[string]any{
		"rate_limiting": JSON{"enabled": false}, "delayed_events": JSON{"max_scheduled_per_user": 1000},
	}, func(t *testing.T, s *server) {
		admin, alice := s.newUser(t), s.newUser(t)
		room := s.room(t, admin, alice)
		const tries = 30
		succeeded := map[string]bool{}
		ended := map[string]bool{}
		for i := range tries {
			require.NoError(t, alice.Join(t.Context(), room))
			e := alice.sendState(t, room, "key", 3600, JSON{"try": i})
			delayID := alice.delayMessage(t, room, time.Hour, strconv.Itoa(i))
			var together sync.WaitGroup
			together.Go(func() {
				time.Sleep(time.Duration(i%10) * 2 * time.Millisecond)
				if i%2 == 0 {
					alice.do(t, http.MethodPost, "/_matrix/client/v3/rooms/"+url.PathEscape(room)+"/leave", JSON{})
				} else {
					admin.do(t, http.MethodPost, "/_matrix/client/v3/rooms/"+url.PathEscape(room)+"/kick", JSON{"user_id": alice.UserID})
				}
			})
			together.Go(func() {
				code, errcode := s.keepAlive(t, "end", e.token)
				require.Contains(t, []int{http.StatusOK, http.StatusForbidden, http.StatusNotFound}, code, errcode)
				ended[e.eventID] = code == http.StatusOK
			})
			var sent homeserver.Response
			together.Go(func() {
				sent = alice.actDelayed(t, unstableDelayed, delayID, "send")
			})
			together.Wait()
			require.Contains(t, []int{http.StatusOK, http.StatusForbidden, http.StatusNotFound}, sent.Code, sent)
			if sent.Code == http.StatusOK {
				succeeded[alice.delayed(t, delayID).Get("event_id").Str] = true
			}
		}
		came, closed := map[string]bool{}, map[string]bool{}
		for _, e := range admin.timeline(t, room) {
			came[e.Get("event_id").Str] = true
			closed[e.Get(`content.m\.relates_to.event_id`).Str] = true
		}
		oks := 0
		for eventID, ok := range ended {
			if ok {
				oks++
				require.True(t, closed[eventID], "/end answered 200, and nobody sees the closing event of %s", eventID)
			}
		}
		for eventID := range succeeded {
			require.True(t, came[eventID], "send answered 200, and nobody sees the event %s", eventID)
		}
		t.Logf("of %d tries, %d ended and %d sent in time", tries, oks, len(succeeded))
	})
}
