package expiration

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

func TestCancelAll(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		bobs := later("!room")
		bobs.Sender = bob
		cancelled := []string{
			w.schedule(leave("key"), "state", 10*time.Second), w.schedule(later("!other"), "message", 10*time.Second),
		}
		bobsID, err := w.Schedule(t.Context(), bobs, Delayed{Content: []byte("bob's")}, 10*time.Second, false)
		require.NoError(t, err)
		expiring := w.state("expiring", time.Hour)

		w.store.set(false, failing("finalise"))
		require.ErrorIs(t, w.CancelAll(t.Context(), alice), errFault)
		w.store.set(false, nil)
		require.NoError(t, w.CancelAll(t.Context(), alice))
		require.NoError(t, w.CancelAll(t.Context(), alice), "a second call has nothing to cancel")
		w.wantErased(cancelled...)
		require.NoError(t, w.RestartDelayed(t.Context(), bobsID, bob), "another user's event")
		require.True(t, w.Running(expiring.ID, expiring.Sender), "the event is in the room")
		w.restart(time.Second)
		time.Sleep(time.Minute)
		w.wantSent("bob's")
	})
}

// An event that is being sent is in the room when CancelAll returns, before anything that the caller does next.
func TestCancelAllWaitsForWhatIsBeingSent(t *testing.T) {
	for name, test := range map[string]struct {
		takes, waits time.Duration
	}{
		"it is sent":    {3 * time.Second, 3 * time.Second},
		"it never ends": {time.Hour, cancelPatience},
	} {
		t.Run(name, func(t *testing.T) {
			inWorld(t, Config{}, func(t *testing.T, w *world) {
				w.schedule(later("!room"), "being sent", time.Second)
				w.roomserver.set(hooks{afterClaim: takes(test.takes)})
				time.Sleep(time.Second)
				synctest.Wait()
				start := time.Now()
				require.NoError(t, w.CancelAll(t.Context(), alice))
				require.Equal(t, test.waits, time.Since(start))
				if test.waits == test.takes {
					w.wantSent("being sent")
				}
				time.Sleep(2 * time.Hour)
				w.wantSent("being sent")
			})
		})
	}
}

// The attempt can also be that of a send of the same state, which first finishes what is claimed.
func TestCancelAllWaitsForASendThatFinishesAnEvent(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		w.schedule(leave("key"), "being sent", time.Second)
		w.roomserver.set(hooks{afterClaim: fails})
		time.Sleep(time.Second)
		synctest.Wait()
		w.roomserver.set(hooks{afterClaim: takes(2 * time.Second)})
		s, _ := leave("key").State()
		go func() {
			if unlock, err := w.LockState(t.Context(), s); err == nil {
				unlock()
			}
		}()
		synctest.Wait()
		require.NoError(t, w.CancelAll(t.Context(), alice))
		w.wantSent("being sent")
	})
}

// What was finalised before is deleted too. If that fails, CancelAll says so.
func TestCancelAllDeletesFinalisedEvents(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		sent, cancelled := w.schedule(later("!room"), "sent", time.Second), w.schedule(later("!room"), "cancelled", time.Hour)
		require.NoError(t, w.CancelDelayed(t.Context(), cancelled, alice))
		time.Sleep(time.Second)
		w.wantSent("sent")
		w.store.set(false, failing("erase"))
		require.ErrorIs(t, w.CancelAll(t.Context(), alice), errFault)
		w.store.set(false, nil)
		require.NoError(t, w.CancelAll(t.Context(), alice))
		w.wantErased(sent, cancelled)
		require.Empty(t, w.store.finalised)
	})
}

// An event that is being built while it is cancelled is not sent.
func TestCancelAllWhileAnEventIsBuilt(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		delayID := w.schedule(leave("key"), "left", time.Second)
		w.roomserver.set(hooks{beforeClaim: takes(2 * time.Second)})
		time.Sleep(2 * time.Second)
		require.NoError(t, w.CancelAll(t.Context(), alice))
		w.wantErased(delayID)
		time.Sleep(time.Hour)
		w.wantSent()
	})
}

func TestCancelState(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		s, _ := leave("key").State()
		bobs := leave("key")
		bobs.Sender = bob
		early := w.schedule(leave("key"), "early", time.Hour)
		bobsID, err := w.Schedule(t.Context(), bobs, Delayed{Content: []byte("bob's")}, time.Hour, false)
		require.NoError(t, err)
		other := w.schedule(leave("other"), "another key", time.Hour)
		time.Sleep(time.Second)
		left := time.Now()
		time.Sleep(time.Second)
		late := w.schedule(leave("key"), "late", time.Hour)

		w.store.set(false, failing("finalise"))
		require.ErrorIs(t, w.CancelState(t.Context(), s, alice, left), errFault)
		w.store.set(false, nil)
		require.NoError(t, w.CancelState(t.Context(), s, alice, left))
		w.wantFinal(early, Final.Cancelled)
		for _, delayID := range []string{other, late} {
			require.Nil(t, w.final(delayID))
		}
		require.NoError(t, w.CancelDelayed(t.Context(), bobsID, bob))
	})
}

// An event of a deactivated account is cancelled when it is due, or when a request asks to send it.
func TestDelayedEventOfADeactivatedAccount(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		due, asked := w.schedule(leave("due"), "due", time.Second), w.schedule(leave("asked"), "asked", time.Hour)
		w.roomserver.set(hooks{beforeClaim: func(Event) error { return &DropError{Reason: Deactivated} }})
		time.Sleep(time.Second)
		synctest.Wait()
		w.wantErased(due)
		require.ErrorIs(t, w.SendDelayed(t.Context(), asked, ""), ErrNotFound)
		w.wantErased(asked)
		w.wantSent()
	})
}

// An event that is being stored while its sender's events are cancelled is cancelled once it is stored.
func TestCancelWhileAnEventIsStored(t *testing.T) {
	s, _ := leave("key").State()
	for name, cancel := range map[string]func(w *world, done <-chan scheduling){
		"all": func(w *world, done <-chan scheduling) {
			require.NoError(t, w.CancelAll(w.t.Context(), alice))
			w.wantErased((<-done).delayID)
		},
		"state": func(w *world, done <-chan scheduling) {
			require.NoError(t, w.CancelState(w.t.Context(), s, alice, time.Now().Add(time.Hour)))
			w.wantFinal((<-done).delayID, Final.Cancelled)
		},
	} {
		t.Run(name, func(t *testing.T) {
			whilePending(t, func(t *testing.T, w *world) {
				cancel(w, w.scheduleBehind(leave("key"), "left", time.Hour))
			})
		})
	}
}
