package expiration

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/stretchr/testify/require"
)

func TestPassingFaultsAreRetried(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		attempted := make(chan time.Time, 100)
		w.roomserver.set(hooks{beforeClaim: func(Event) error {
			attempted <- time.Now()
			return errFault
		}})
		e := w.message("!room", 10*time.Second)
		require.ErrorIs(t, w.End(t.Context(), w.hash(e)), errFault)
		require.NoError(t, w.Refresh(t.Context(), w.hash(e)), "the timer goes on")
		<-attempted
		time.Sleep(10*time.Second + 5*time.Minute)
		w.wantClosings()
		var attempts []time.Time
		for len(attempted) > 0 {
			attempts = append(attempts, <-attempted)
		}
		require.Greater(t, len(attempts), 8)
		require.Less(t, len(attempts), 25, "without a pause")
		for i := 2; i < len(attempts); i++ {
			require.GreaterOrEqual(t, attempts[i].Sub(attempts[i-1]), min(attempts[i-1].Sub(attempts[i-2]), lastPause), "the backoff grows")
		}
		require.NoError(t, w.Refresh(t.Context(), w.hash(e)), "a live client keeps the event, faults or not")
		w.roomserver.set(hooks{})
		time.Sleep(9 * time.Second)
		w.wantClosings()
		time.Sleep(time.Second)
		w.wantClosings(e)
	})
}

// A fault drops no timer, however long it lasts.
func TestLongFaults(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		e := w.message("!room", 10*time.Second)
		w.roomserver.set(hooks{beforeClaim: fails})
		time.Sleep(2 * givenUpAfter * lastPause)
		w.roomserver.set(hooks{})
		time.Sleep(lastPause)
		w.wantClosings(e)
	})
}

// The stream reports another user's event late. The closing attempt must find it by itself.
func TestReplacedBehindOurBack(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		e := w.state("key", 10*time.Second)
		s, _ := e.State()
		w.roomserver.send(Event{ID: "$remote", RoomID: s.RoomID, Type: s.Type, StateKey: &s.Key})
		time.Sleep(11 * time.Second)
		w.wantClosings()
		require.Zero(t, w.store.len())
		require.ErrorIs(t, w.Refresh(t.Context(), w.hash(e)), ErrNotFound)
		require.EqualValues(t, 1, testutil.ToFloat64(w.metrics.drops.WithLabelValues("replaced")))
	})
}

// After a crash between the row and the event, the roomserver does not know the event, but may still have it in its queue.
func TestEventThatNeverCame(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		lost := Event{ID: "$lost", RoomID: "!room", Type: "m", Sender: "@alice:example.org"}
		late := Event{ID: "$late", RoomID: "!room", Type: "m", Sender: "@alice:example.org"}
		for _, e := range []Event{lost, late} {
			_, err := w.Begin(t.Context(), e, time.Second, false)
			require.NoError(t, err)
		}
		w.restart(time.Second)
		time.Sleep(5 * time.Minute)
		w.wantClosings()
		w.roomserver.set(hooks{wake: func(Event) error { w.roomserver.send(late); return nil }})
		time.Sleep(time.Minute)
		w.wantClosings(late)
		time.Sleep(givenUpAfter * lastPause)
		require.Zero(t, w.store.len())
		w.wantClosings(late)
	})
}

// A crash sets the room back to before the event, and the event that restores it is in the roomserver's queue.
func TestStateSetBack(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		older := w.roomserver.sendRemote("!room", "m", "key")
		e, lost := w.state("key", 10*time.Second), w.state("other", 10*time.Second)
		s, _ := e.State()
		other, _ := lost.State()
		w.roomserver.setBack(s, older)
		w.roomserver.setBack(other, "")
		w.StateRemoved(t.Context(), e.ID)
		w.StateChanged(t.Context(), s, "")
		w.RoomChanged(t.Context(), s.RoomID)
		require.NoError(t, w.Refresh(t.Context(), w.hash(e)))
		time.Sleep(5 * time.Minute)
		w.wantClosings()
		w.roomserver.set(hooks{wake: func(woken Event) error { // without Wake the roomserver does nothing for a quiet room
			if woken.RoomID == s.RoomID {
				w.roomserver.setBack(s, e.ID)
			}
			return nil
		}})
		time.Sleep(time.Minute)
		w.wantClosings(e)
		for range 2 * lostAfter { // repeated requests must not shorten the time
			require.ErrorIs(t, w.End(t.Context(), w.hash(lost)), ErrSetBack)
		}

		// An event that nothing restores is closed all the same, because other servers have it as the current state.
		time.Sleep(lostAfter * lastPause)
		w.wantClosings(e, lost)
		require.Zero(t, w.store.len())
	})
}

// Waiting for an event that the roomserver does not know does not count as waiting for it to be restored.
func TestStateSetBackLater(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		e := w.begin("key", time.Second)
		w.restart(time.Second)
		time.Sleep(2 * lostAfter * lastPause)
		s, _ := e.State()
		w.roomserver.send(e)
		w.roomserver.setBack(s, "")
		time.Sleep(5 * time.Minute)
		w.wantClosings()
		time.Sleep(lostAfter * lastPause)
		w.wantClosings(e)
	})
}

// An event that is refused for good when it is due has failed. If a request asks for it earlier, it gets the refusal, and can try later.
func TestRefusedDelayedEvents(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		never, now := w.schedule(leave("key"), "never", 10*time.Second), w.schedule(later("!room"), "now", 10*time.Second)
		w.roomserver.refuse("never", Forbidden)
		w.roomserver.refuse("now", Forbidden)
		var refused *RefusedError
		require.ErrorAs(t, w.SendDelayed(t.Context(), now, alice), &refused)
		require.Equal(t, 403, refused.Code)
		require.JSONEq(t, `{"errcode":"M_FORBIDDEN"}`, string(refused.Response))
		require.Nil(t, w.final(now), "the event stays scheduled")
		w.roomserver.refuse("now", "")
		time.Sleep(10*time.Second - time.Nanosecond)
		w.wantSent()
		time.Sleep(time.Nanosecond)
		w.wantSent("now")
		require.Equal(t, &Final{At: w.stored(time.Now()), Error: refused.Response}, w.final(never))
		wantFinalised(t, w.SendDelayed(t.Context(), never, alice), failed)
		wantFinalised(t, w.CancelDelayed(t.Context(), never, alice), failed)
		w.restart(time.Second)
		require.JSONEq(t, `{"errcode":"M_FORBIDDEN"}`, string(w.final(never).Error))
		require.Zero(t, w.store.len())
	})
}

// A refusal does not finalise an event that was restarted during the attempt.
func TestRefreshWhileAnEventIsRefused(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		delayID, e := w.schedule(leave("key"), "left", 10*time.Second), w.state("other", 10*time.Second)
		w.roomserver.refuse("left", Forbidden)
		w.roomserver.refuse(e.ID, Forbidden)
		w.roomserver.set(hooks{beforeClaim: takes(2 * time.Second)})
		time.Sleep(11 * time.Second)
		require.NoError(t, w.RestartDelayed(t.Context(), delayID, alice))
		require.NoError(t, w.Refresh(t.Context(), w.hash(e)))
		time.Sleep(5 * time.Second)
		require.Nil(t, w.final(delayID))
		w.roomserver.refuse("left", "")
		w.roomserver.refuse(e.ID, "")
		time.Sleep(15 * time.Second)
		w.wantSent("left")
		w.wantClosings(e)
	})
}

// Whichever operation fails in passing, and whether it is written or not, the event is sent once and its result is known.
func TestPassingFaultsOfDelayedEvents(t *testing.T) {
	for _, fault := range []string{"read", "claim", "finalise", "build", "input"} {
		for _, written := range []bool{false, true} {
			for _, now := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s written=%t now=%t", fault, written, now), func(t *testing.T) {
					inWorld(t, Config{}, func(t *testing.T, w *world) {
						delayID := w.schedule(leave("key"), "left", 10*time.Second)
						w.setFault(fault, written)
						if now {
							require.ErrorIs(t, w.SendDelayed(t.Context(), delayID, alice), errFault)
						}
						time.Sleep(5 * time.Minute)
						synctest.Wait()
						w.setFault("", false)
						time.Sleep(time.Minute)
						w.wantSent("left")
						require.Equal(t, w.roomserver.sent()[0].eventID, w.final(delayID).EventID)
						require.True(t, w.index.Empty())
						require.Empty(t, w.inFlight)
						require.Zero(t, w.store.len())
						require.True(t, w.HasSent(alice))
					})
				})
			}
		}
	}
}

// A client that keeps restarting its event while nothing can be sent keeps it from being sent.
func TestRestartDuringFaults(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		w.roomserver.set(hooks{beforeClaim: fails})
		delayID := w.schedule(leave("key"), "left", 10*time.Second)
		time.Sleep(time.Minute)
		require.NoError(t, w.RestartDelayed(t.Context(), delayID, alice))
		w.roomserver.set(hooks{})
		time.Sleep(10*time.Second - time.Nanosecond)
		w.wantSent()
		time.Sleep(time.Nanosecond)
		w.wantSent("left")
	})
}
