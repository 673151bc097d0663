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
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/patience"
)

// A panic inside Dendrite while a due event is sent ends neither the process nor another timer. The event is given up after a few
// attempts.
func TestPanicsWhenDue(t *testing.T) {
	t.Parallel()
	for _, db := range databases {
		t.Run(db.name, func(t *testing.T) {
			t.Parallel()
			s := startWithFailpoints(t, homeserver.Config{Postgres: db.open(t), Expiration: unlimited})
			alice := s.newUser(t)
			room := s.room(t, alice)
			life := patience.Life(2)
			e := alice.sendState(t, room, "bad", life, nil)
			delayID := alice.delayMessage(t, room, time.Duration(life)*time.Second, "bad")
			require.NoError(t, s.Failpoints("before-input panic"))
			eventually(t, "the delayed event is finalised", func() bool {
				return alice.delayed(t, delayID).Get("finalised.error.errcode").Exists()
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

// An expiring event fits when it is sent, but its closing event does not. It is dropped, and a request to end it is answered with the
// reason.
func TestRefusedWhenDue(t *testing.T) {
	t.Parallel()
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

		expired := send(patience.Life(2), "expired")
		remove("expired")
		eventually(t, "the timer is dropped", func() bool { return s.metric(t, "dendrite_expiration_drops_total", `reason="forbidden"`) == 2 })
		s.refused(t, expired.token)
		require.Empty(t, alice.closings(t, room, expired.eventID))
	})
}

// A 200 for /end, or for send, means that the event is in the room. That holds even if its sender leaves or is kicked at the same moment.
func TestEndWhileTheSenderLeaves(t *testing.T) {
	t.Parallel()
	testEndWhileTheSenderLeaves(t, 10)
}

func testEndWhileTheSenderLeaves(t *testing.T, tries int) {
	onEachDatabase(t, map[string]any{
		"rate_limiting": JSON{"enabled": false}, "delayed_events": JSON{"max_scheduled_per_user": 1000},
	}, func(t *testing.T, s *server) {
		admin, alice := s.newUser(t), s.newUser(t)
		room := s.room(t, admin, alice)
		ended, sent := 0, 0
		follower := admin.follow(t, room)
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
			var ending, sending int
			together.Go(func() { ending, _ = s.keepAlive(t, "end", e.token) })
			together.Go(func() { sending = alice.actDelayed(t, unstableDelayed, delayID, "send").Code })
			together.Wait()
			require.Contains(t, []int{http.StatusOK, http.StatusForbidden, http.StatusNotFound}, ending)
			require.Contains(t, []int{http.StatusOK, http.StatusForbidden, http.StatusNotFound}, sending)
			if ending == http.StatusOK {
				ended++
				follower.awaitClosing(t, e.eventID, "ended")
			}
			if sending == http.StatusOK {
				sent++
				follower.awaitEvent(t, alice.delayed(t, delayID).Get("finalised.event_id").Str)
			}
		}
		t.Logf("of %d tries, %d ended and %d sent in time", tries, ended, sent)
	})
}
