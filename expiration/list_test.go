package expiration

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

func TestDelayedEventsAreListedInOrder(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		const rest = 300 * time.Microsecond
		time.Sleep(rest) // the deadlines are not whole milliseconds
		third, first := w.schedule(leave("key"), "third", 30*time.Second), w.schedule(later("!a"), "first", 10*time.Second)
		second, gone := w.schedule(later("!b"), "second", 20*time.Second), w.schedule(later("!b"), "gone", 5*time.Second)
		w.message("!room", 15*time.Second)
		want := func(delayIDs ...string) []DelayedEvent {
			t.Helper()
			events := w.list(alice, "")
			var got []string
			for _, e := range events {
				require.Nil(t, e.Final)
				got = append(got, e.DelayID)
			}
			require.Equal(t, delayIDs, got)
			return events
		}
		want(gone, first, second, third)
		time.Sleep(5 * time.Second)
		synctest.Wait()
		want(first, second, third)
		require.NoError(t, w.RestartDelayed(t.Context(), first, alice))
		time.Sleep(time.Second)
		w.restart(time.Second)
		time.Sleep(rest)
		require.NoError(t, w.RestartDelayed(t.Context(), first, alice))
		restarted := w.stored(time.Now())
		events := want(first, second, third)
		require.Equal(t, restarted, events[0].DelayedSince())
		require.Equal(t, "first", string(events[0].Timer.Delayed.Content))
		require.Equal(t, "!a", events[0].Timer.Event.RoomID)
		require.Equal(t, 10*time.Second, events[0].Timer.Duration)
		one, err := w.DelayedEvent(t.Context(), first, alice)
		require.NoError(t, err)
		one.Place = events[0].Place
		require.Equal(t, events[0], one)
		_, err = w.DelayedEvent(t.Context(), first, bob)
		require.ErrorIs(t, err, ErrNotFound)
		_, err = w.DelayedEvent(t.Context(), gone, bob)
		require.ErrorIs(t, err, ErrNotFound)
		require.Empty(t, w.list(bob, ""))
		// Listing after each event returns those that follow it.
		for i, e := range events {
			require.Equal(t, events[i+1:], w.list(alice, e.Place))
		}
		require.Empty(t, w.list(alice, "x"))
	})
}

// Events that are due in the same millisecond have different places, and only as many rows are read as the caller wants.
func TestPlacesInTheList(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		for range 20 {
			w.schedule(later("!a"), "same", 10*time.Second)
		}
		all, from := w.list(alice, ""), ""
		require.Len(t, all, 20)
		for i := range all {
			for e, err := range w.DelayedEvents(t.Context(), alice, from) {
				require.NoError(t, err)
				require.Equal(t, all[i], e)
				from = e.Place
				break
			}
		}
		require.Empty(t, w.list(alice, from))
		w.store.set(false, failing("read"))
		n := 0
		for _, err := range w.DelayedEvents(t.Context(), alice, "") {
			require.Error(t, err)
			n++
		}
		require.Equal(t, 1, n)
		w.store.set(false, nil)
	})
}
