package expiration

import (
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

// After a cancellation failed, the write may have happened or not. The timers find out before they send anything.
func TestCancellationThatFails(t *testing.T) {
	for _, written := range []bool{false, true} {
		for _, next := range []string{"cancel", "restart", "send", "wait", "process restart"} {
			inWorld(t, Config{}, func(t *testing.T, w *world) {
				delayID := w.schedule(leave("key"), "left", 10*time.Second)
				w.store.set(written, failing("finalise"))
				require.ErrorIs(t, w.CancelDelayed(t.Context(), delayID, alice), errFault)
				w.store.set(false, nil)
				var err error
				switch next {
				case "cancel":
					err = w.CancelDelayed(t.Context(), delayID, alice)
				case "restart":
					err = w.RestartDelayed(t.Context(), delayID, alice)
				case "send":
					err = w.SendDelayed(t.Context(), delayID, alice)
				case "process restart":
					w.restart(0)
				}
				if written && next != "wait" && next != "process restart" {
					wantFinalised(t, err, Final.Cancelled)
				} else {
					require.NoError(t, err)
				}
				time.Sleep(time.Minute)
				synctest.Wait()
				cancelled := written || next == "cancel"
				require.Equal(t, cancelled, w.final(delayID).Cancelled())
				if cancelled {
					w.wantSent()
				} else {
					w.wantSent("left")
				}
				require.True(t, w.index.Empty())
			})
		}
	}
}

// Sending, cancelling, restarting and the deadline coincide: one wins, and all callers get the same result.
func TestEndsOfADelayedEventExcludeEachOther(t *testing.T) {
	for round := range 60 {
		inWorld(t, Config{}, func(t *testing.T, w *world) {
			if round%3 > 0 {
				w.roomserver.set(hooks{beforeClaim: takes(time.Duration(round%4) * time.Millisecond), afterClaim: takes(time.Millisecond)})
			}
			delayID := w.schedule(leave("key"), "left", 10*time.Second)
			time.Sleep(10*time.Second + time.Duration(round%5-2)*time.Millisecond)
			var (
				wg                         sync.WaitGroup
				sent, cancelled, restarted error
			)
			wg.Go(func() { restarted = w.RestartDelayed(t.Context(), delayID, alice) })
			wg.Go(func() {
				time.Sleep(time.Duration(round%7) * time.Millisecond / 2)
				cancelled = w.CancelDelayed(t.Context(), delayID, alice)
			})
			if round%2 == 0 {
				wg.Go(func() { sent = w.SendDelayed(t.Context(), delayID, alice) })
			} else {
				sent = &FinalisedError{}
			}
			wg.Wait()
			time.Sleep(time.Minute)
			synctest.Wait()
			f := w.final(delayID)
			require.NotNil(t, f)
			require.Equal(t, f.Cancelled(), cancelled == nil)
			require.False(t, sent == nil && cancelled == nil)
			for _, err := range []error{sent, cancelled, restarted} {
				if err != nil {
					wantFinalised(t, err, func(other Final) bool {
						return round%2 == 1 && err == sent || other.Sent() == f.Sent() && other.EventID == f.EventID
					})
				}
			}
			if f.Sent() {
				w.wantSent("left")
			} else {
				w.wantSent()
			}
			require.True(t, w.index.Empty())
		})
	}
}

func TestFinalisedEventsAreForgotten(t *testing.T) {
	inWorld(t, Config{KeepFinalised: 24 * time.Hour, MaxFinalisedPerUser: 2}, func(t *testing.T, w *world) {
		delayID := w.schedule(requested(leave("key"), 1), "left", 30*time.Minute)
		time.Sleep(30 * time.Minute)
		w.wantSent("left")
		time.Sleep(24 * time.Hour)
		w.wantFinal(delayID, Final.Sent)
		require.True(t, w.HasSent(alice))
		w.store.set(false, failing("senders"))
		time.Sleep(pruneInterval)
		synctest.Wait()
		require.True(t, w.HasSent(alice), "that nothing is left is not known")
		w.store.set(false, nil)
		time.Sleep(pruneInterval)
		synctest.Wait()
		require.False(t, w.AnySent())
		_, err := w.DelayedEvent(t.Context(), delayID, alice)
		require.ErrorIs(t, err, ErrNotFound)
		require.ErrorIs(t, w.SendDelayed(t.Context(), delayID, alice), ErrNotFound)
		again := w.schedule(requested(leave("key"), 1), "left", 10*time.Hour)
		require.NotEqual(t, delayID, again)

		// A user who sends an event while the users are read is not forgotten.
		w.store.set(false, func(operation string) error {
			if operation == "senders" {
				w.mu.Lock()
				w.senders[w.tokens.names.hash(alice)] = w.round
				w.mu.Unlock()
			}
			return nil
		})
		time.Sleep(pruneInterval)
		synctest.Wait()
		require.True(t, w.HasSent(alice))
		w.store.set(false, nil)

		var ids []string
		for range 3 {
			ids = append(ids, w.schedule(later("!room"), "x", time.Second))
			time.Sleep(time.Second)
			synctest.Wait()
		}
		_, err = w.DelayedEvent(t.Context(), ids[0], alice)
		require.ErrorIs(t, err, ErrNotFound, "more events than are kept")
		w.wantFinal(ids[1], Final.Sent)
		w.wantFinal(ids[2], Final.Sent)
		require.Nil(t, w.final(again))
	})
}
