package expiration

import (
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

// A repeated request gets the delay ID of the first, whatever has become of the event.
func TestRepeatedSchedule(t *testing.T) {
	inWorld(t, Config{MaxScheduledPerUser: 2}, func(t *testing.T, w *world) {
		w.store.setInsertTakes(time.Second, false) // by then all requests have arrived
		var wg sync.WaitGroup
		ids := make([]string, 10)
		for i := range ids {
			wg.Go(func() {
				var err error
				ids[i], err = w.Schedule(t.Context(), requested(leave("key"), 1), Delayed{Content: []byte("left")}, 10*time.Second, false)
				if err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		w.store.setInsertTakes(0, false)
		delayID := ids[0]
		for _, id := range ids {
			require.Equal(t, delayID, id)
		}
		again := func() {
			t.Helper()
			require.Equal(t, delayID, w.schedule(requested(leave("key"), 1), "other", time.Hour))
			got, err := w.Scheduled(t.Context(), RequestHash{1})
			require.NoError(t, err)
			require.Equal(t, delayID, got)
		}
		another := w.schedule(requested(leave("key"), 2), "another", time.Hour)
		require.NotEqual(t, delayID, another)
		again() // although the limit is reached
		w.restart(time.Second)
		again()
		require.Equal(t, 2, w.store.len())
		time.Sleep(10 * time.Second)
		w.wantSent("left")
		again()
		w.restart(time.Second)
		again()
		require.NoError(t, w.CancelDelayed(t.Context(), another, alice))
		require.Equal(t, another, w.schedule(requested(leave("key"), 2), "another", time.Second))
		time.Sleep(time.Minute)
		w.wantSent("left")
		id, err := w.Scheduled(t.Context(), RequestHash{3})
		require.NoError(t, err)
		require.Empty(t, id)
		require.NotEqual(t, w.schedule(later("!room"), "x", time.Hour), w.schedule(later("!room"), "x", time.Hour), "without a transaction ID")
	})
}

// No delay ID is given for an event whose insertion failed, whether the row was written or not.
func TestScheduleThatFails(t *testing.T) {
	for _, written := range []bool{false, true} {
		for _, broken := range [][]string{{"insert"}, {"insert", "drop"}, {"requested"}} {
			inWorld(t, Config{MaxScheduledPerUser: 1}, func(t *testing.T, w *world) {
				w.store.set(false, func(operation string) error {
					w.store.after = written && operation == "insert"
					return failing(broken...)(operation)
				})
				for range 2 {
					_, err := w.Schedule(t.Context(), requested(leave("key"), 1), Delayed{Content: []byte("left")}, 10*time.Second, false)
					require.Error(t, err)
				}
				w.store.set(false, nil)
				delayID := w.schedule(requested(leave("key"), 1), "left", 10*time.Second)
				require.NoError(t, w.RestartDelayed(t.Context(), delayID, alice))
				time.Sleep(time.Minute)
				w.wantSent("left")
				w.wantFinal(delayID, Final.Sent)
			})
		}
	}
}

func TestLimitOfDelayedEvents(t *testing.T) {
	inWorld(t, Config{MaxScheduledPerUser: 2, MaxScheduledPerServiceUser: 3, MaxRunningPerUser: 1}, func(t *testing.T, w *world) {
		w.message("!room", 5*time.Second) // running events have a limit of their own
		first := w.schedule(leave("key"), "first", 10*time.Second)
		w.schedule(leave("key"), "second", time.Minute)
		time.Sleep(4 * time.Second)
		schedule := func(sender string, service bool) error {
			e := leave("key")
			e.Sender = sender
			_, err := w.Schedule(t.Context(), e, Delayed{Content: []byte("x")}, time.Hour, service)
			return err
		}
		var limit *LimitError
		require.ErrorAs(t, schedule(alice, false), &limit)
		require.Equal(t, 6*time.Second+usualAttempt, limit.RetryAfter)
		require.NoError(t, w.RestartDelayed(t.Context(), first, alice))
		require.ErrorAs(t, schedule(alice, false), &limit)
		require.Equal(t, 10*time.Second+usualAttempt, limit.RetryAfter)
		require.NoError(t, schedule(bob, false), "another user's limit")
		require.NoError(t, w.CancelDelayed(t.Context(), first, alice))
		require.NoError(t, schedule(alice, false))
		require.ErrorAs(t, schedule(alice, false), &limit)
		for range 3 { // what an application service schedules for the user counts apart
			require.NoError(t, schedule(alice, true))
		}
		require.ErrorAs(t, schedule(alice, true), &limit)
		w.restart(0)
		require.ErrorAs(t, schedule(alice, true), &limit)
		require.ErrorAs(t, schedule(alice, false), &limit)
		time.Sleep(2 * time.Second)
		synctest.Wait()
		w.message("!room", time.Second) // the first event has expired
		_, err := w.Begin(t.Context(), Event{ID: "$x", RoomID: "!room", Sender: alice}, time.Second, false)
		require.ErrorAs(t, err, &limit)
		require.Equal(t, time.Second+usualAttempt, limit.RetryAfter, "the limit of expiring events")
	})
}
