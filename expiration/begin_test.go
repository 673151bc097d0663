package expiration

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

func TestLimitPerUser(t *testing.T) {
	inWorld(t, Config{MaxRunningPerUser: 2}, func(t *testing.T, w *world) {
		first := w.state("key", 10*time.Second)
		w.message("!room", time.Minute)
		time.Sleep(4 * time.Second)
		another := Event{ID: "$another", RoomID: "!room", Type: "m", Sender: "@alice:example.org"}
		_, err := w.Begin(t.Context(), another, time.Second, false)
		var limit *LimitError
		require.ErrorAs(t, err, &limit)
		require.Equal(t, 6*time.Second+usualAttempt, limit.RetryAfter)
		_, err = w.Begin(t.Context(), Event{ID: "$bob", Sender: "@bob:example.org"}, time.Second, false)
		require.NoError(t, err, "another user's limit")
		_, err = w.Begin(t.Context(), Event{ID: "$bridge", Sender: "@alice:example.org"}, time.Second, true)
		require.NoError(t, err, "an application service has no limit")
		w.DropEvent(t.Context(), first.ID, Redacted)
		_, err = w.Begin(t.Context(), another, time.Second, false)
		require.Error(t, err, "the service's timer counts")
	})
	inWorld(t, Config{MaxRunningPerUser: 2}, func(t *testing.T, w *world) {
		w.state("key", 10*time.Second)
		w.message("!room", time.Minute)
		for range 5 {
			w.state("key", 10*time.Second) // replaces the first, so it does not count
		}
	})
}

// A timer that is MaybeReplaced counts against the limit, and so does one that turns out not to be replaced.
func TestLimitCountsWhatIsLookedAt(t *testing.T) {
	inWorld(t, Config{MaxRunningPerUser: 1}, func(t *testing.T, w *world) {
		e := w.state("key", time.Hour)
		s, _ := e.State()
		full := func() {
			t.Helper()
			_, err := w.Begin(t.Context(), Event{ID: "$more", RoomID: "!room", Type: "m", Sender: e.Sender}, time.Hour, false)
			require.ErrorAs(t, err, new(*LimitError))
		}
		require.NoError(t, w.RoomChanged(t.Context(), s.RoomID))
		require.True(t, w.isDoubtful(w.ofEvent(e.ID)))
		full()
		w.StateSent(s, "$crossed")
		time.Sleep(lookAgainAfter + time.Millisecond)
		synctest.Wait()
		full()
		require.NoError(t, w.Refresh(t.Context(), w.hash(e)))
	})
}

func TestFailedInsertIsNotCounted(t *testing.T) {
	inWorld(t, Config{MaxRunningPerUser: 1}, func(t *testing.T, w *world) {
		w.store.set(false, func(string) error { return errFault })
		for range 3 {
			_, err := w.Begin(t.Context(), Event{ID: "$x", Sender: "@alice:example.org"}, time.Second, false)
			require.ErrorIs(t, err, errFault)
		}
		w.store.set(false, nil)
		w.message("!room", time.Second)
	})
}

// An event that the roomserver failed to take does not count against the limit. If the client tries again, it gets the same event.
func TestRoomserverFailsToTakeEvents(t *testing.T) {
	inWorld(t, Config{MaxRunningPerUser: 2}, func(t *testing.T, w *world) {
		refused := func(n int) error {
			e := Event{
				ID: fmt.Sprintf("$event%d", n), RoomID: "!room", Type: "m", Sender: "@alice:example.org",
				Request: &Request{Hash: RequestHash{byte(n)}, Signed: SignedEvent{EventID: fmt.Sprintf("$event%d", n)}},
			}
			p, err := w.Begin(t.Context(), e, time.Second, false)
			if err == nil {
				p.Activate(false)
			}
			return err
		}
		for n := range 3 {
			require.NoError(t, refused(n))
		}
		w.restart(time.Minute) // before the timers are attempted again
		for n := 3; n < 2*unsentFactor; n++ {
			require.NoError(t, refused(n))
		}
		var limit *LimitError
		require.ErrorAs(t, refused(100), &limit, "these timers are bounded too")
		w.restart(time.Minute)
		synctest.Wait()
		require.ErrorAs(t, refused(100), &limit)
		require.Equal(t, firstPause+usualAttempt, limit.RetryAfter, "when the first of them is attempted again")
		eventID, err := w.Sent(t.Context(), RequestHash{0})
		require.NoError(t, err)
		require.Equal(t, "$event0", eventID)
		require.True(t, w.roomserver.has(eventID))
		time.Sleep(givenUpAfter * lastPause)
		require.Zero(t, w.store.len())
		require.Len(t, w.roomserver.closings(), 1)
	})
}

// Two requests can make one event, which then has one timer and one token.
func TestEqualEvents(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		e := w.message("!room", 10*time.Second)
		w.send(e, 10*time.Second)
		require.NoError(t, w.Refresh(t.Context(), w.hash(e)))
		time.Sleep(10 * time.Second)
		w.wantClosings(e)
		w.wantNoRows()
	})
}
