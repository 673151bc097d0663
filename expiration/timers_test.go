package expiration

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/sirupsen/logrus"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration/internal/lanes"
)

func TestMain(m *testing.M) {
	logrus.SetLevel(logrus.PanicLevel) // the tests cause faults on purpose
	goleak.VerifyTestMain(m)           // Stop ends all goroutines
}

func TestExpiresAtTheDeadline(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		e := w.message("!room", 10*time.Second)
		time.Sleep(10*time.Second - time.Nanosecond)
		w.wantClosings()
		time.Sleep(time.Nanosecond)
		w.wantClosings(e)
		require.ErrorIs(t, w.Refresh(t.Context(), w.hash(e)), ErrNotFound)
		require.ErrorIs(t, w.End(t.Context(), w.hash(e)), ErrNotFound)
		w.wantNoRows()
		require.EqualValues(t, 1, testutil.ToFloat64(w.metrics.closings.WithLabelValues("expired")))
	})
}

func TestRefreshHolds(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		e := w.state("key", 10*time.Second)
		for range 20 {
			time.Sleep(9 * time.Second)
			require.NoError(t, w.Refresh(t.Context(), w.hash(e)))
		}
		w.wantClosings()
		time.Sleep(10*time.Second - time.Nanosecond)
		w.wantClosings()
		time.Sleep(time.Nanosecond)
		w.wantClosings(e)
	})
}

func TestEndClosesOnce(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		w.roomserver.set(hooks{beforeClaim: takes(time.Second)})
		e := w.message("!room", 10*time.Second)
		errs := make(chan error, 5)
		for range 5 {
			go func() { errs <- w.End(t.Context(), w.hash(e)) }()
		}
		time.Sleep(time.Minute)
		won := 0
		for range 5 {
			if err := <-errs; err == nil {
				won++
			} else {
				require.ErrorIs(t, err, ErrNotFound)
			}
		}
		require.Equal(t, 1, won)
		w.wantClosings(e)
	})
}

func TestEndSurvivesACallerWhoHangsUp(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		e := w.message("!room", time.Hour)
		w.roomserver.set(hooks{beforeClaim: takes(time.Second)})
		ctx, cancel := context.WithCancel(t.Context())
		go func() { _ = w.End(ctx, w.hash(e)) }()
		synctest.Wait()
		cancel()
		time.Sleep(2 * time.Second)
		w.wantClosings(e)
	})
}

func TestRefreshWinsWhileTheClosingEventIsBuilt(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		w.roomserver.set(hooks{beforeClaim: takes(time.Second)})
		e := w.message("!room", 10*time.Second)
		time.Sleep(10*time.Second + 500*time.Millisecond)
		require.NoError(t, w.Refresh(t.Context(), w.hash(e)), "not claimed yet")
		time.Sleep(10*time.Second + 500*time.Millisecond)
		w.wantClosings()
		time.Sleep(time.Second)
		w.wantClosings(e)
	})
}

// A closing event that was begun before a refresh must not be sent, because it bears a time at which the timer was not due. That holds even
// if building it took so long that the new deadline has passed as well.
func TestNothingBuiltBeforeARefreshIsSent(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		w.roomserver.set(hooks{beforeClaim: takes(8 * time.Second)})
		e := w.message("!room", 4*time.Second)
		time.Sleep(5 * time.Second)
		require.NoError(t, w.Refresh(t.Context(), w.hash(e)), "the new deadline is 9 s after the start")
		time.Sleep(7 * time.Second)
		w.wantClosings()
		time.Sleep(8*time.Second - time.Nanosecond)
		w.wantClosings()
		time.Sleep(time.Nanosecond)
		w.wantClosings(e)
		require.Equal(t, 2, w.roomserver.attempts())
		require.WithinDuration(t, time.Now().Add(-11*time.Second), w.roomserver.closings()[0].sent, time.Millisecond, "the new deadline")
	})
}

func TestRefreshLosesAgainstAClaim(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		w.roomserver.set(hooks{afterClaim: takes(time.Second)})
		e := w.message("!room", 10*time.Second)
		time.Sleep(10*time.Second + 500*time.Millisecond)
		require.ErrorIs(t, w.Refresh(t.Context(), w.hash(e)), ErrNotFound)
		time.Sleep(time.Second)
		w.wantClosings(e)
	})
}

func TestReplacement(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		old := w.state("key", 10*time.Second)
		other := w.state("other", time.Hour)
		e := w.state("key", 20*time.Second)
		require.ErrorIs(t, w.Refresh(t.Context(), w.hash(old)), ErrNotFound)
		require.NoError(t, w.Refresh(t.Context(), w.hash(other)))
		require.Equal(t, 2, w.store.len())
		time.Sleep(15 * time.Second)
		w.wantClosings()
		time.Sleep(10 * time.Second)
		w.wantClosings(e)
	})
}

// A sender who replaces an event does not wait until the state of the room is checked. Still, the old token is invalid at once, and the old
// timer no longer counts against the limit. The timer ends when the stream reports the change, or a second later.
func TestReplacedHere(t *testing.T) {
	for name, use := range map[string]func(*testing.T, *world, Event){
		"refresh": func(t *testing.T, w *world, old Event) {
			require.ErrorIs(t, w.Refresh(t.Context(), w.hash(old)), ErrNotFound)
		},
		"end": func(t *testing.T, w *world, old Event) {
			require.ErrorIs(t, w.End(t.Context(), w.hash(old)), ErrNotFound)
		},
		"send": func(t *testing.T, w *world, old Event) { w.message("!room", 20*time.Second) },
		"hear": func(t *testing.T, w *world, old Event) {
			require.NoError(t, w.StateRemoved(t.Context(), old.ID))
			require.Equal(t, 1, w.store.len())
		},
		"wait":                  func(t *testing.T, w *world, old Event) { time.Sleep(lookAgainAfter + time.Millisecond) },
		"wait for the deadline": func(t *testing.T, w *world, old Event) { time.Sleep(15 * time.Second) },
	} {
		t.Run(name, func(t *testing.T) {
			inWorld(t, Config{MaxRunningPerUser: 2}, func(t *testing.T, w *world) {
				old := w.state("key", 10*time.Second)
				looked := errors.New("somebody goes through the state")
				w.roomserver.set(hooks{look: func(Event) error { return looked }})
				e := w.state("key", 20*time.Second)
				w.roomserver.set(hooks{})
				require.Len(t, w.timersIn("!room"), 2)
				use(t, w, old)
				time.Sleep(lookAgainAfter + sweepPause)
				require.False(t, w.known(w.hash(old)))
				require.NoError(t, w.Refresh(t.Context(), w.hash(e)))
				require.EqualValues(t, 1, testutil.ToFloat64(w.metrics.drops.WithLabelValues("replaced")))
				require.Zero(t, testutil.ToFloat64(w.metrics.errors.WithLabelValues("current_state")))
				time.Sleep(21 * time.Second)
				w.wantNoRows()
				for _, closing := range w.roomserver.closings() {
					require.NotEqual(t, old.ID, closing.closes)
				}
			})
		})
	}
}

// The old token is also invalid if the process dies before the check, even before the sender has an answer.
func TestReplacedBeforeACrash(t *testing.T) {
	for _, answered := range []bool{true, false} {
		inWorld(t, Config{MaxRunningPerUser: 2}, func(t *testing.T, w *world) {
			old, other := w.state("key", time.Hour), w.state("other", time.Hour)
			s, _ := old.State()
			newer := Event{ID: "$newer", RoomID: s.RoomID, Type: s.Type, StateKey: &s.Key}
			require.NoError(t, w.StateComes(t.Context(), s, newer.ID))
			w.roomserver.send(newer)
			if answered {
				require.NoError(t, w.StateSent(t.Context(), s, newer.ID))
			}
			w.restart(time.Second)
			require.ErrorIs(t, w.Refresh(t.Context(), w.hash(old)), ErrNotFound)
			require.NoError(t, w.Refresh(t.Context(), w.hash(other)))
			w.restart(time.Second)
			require.Len(t, w.timersIn(s.RoomID), 1)
		})
	}
}

// A timer that was doubted but whose event was not replaced is checked after a crash, and goes on.
func TestNotReplacedBeforeACrash(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		e := w.state("key", 10*time.Second)
		s, _ := e.State()
		require.NoError(t, w.StateComes(t.Context(), s, "$lost"))
		w.restart(time.Second)
		require.True(t, w.isDoubtful(w.ofEvent(e.ID)))
		require.NoError(t, w.Refresh(t.Context(), w.hash(e)))
		time.Sleep(lookAgainAfter)
		synctest.Wait()
		require.False(t, w.isDoubtful(w.ofEvent(e.ID)))
		time.Sleep(10*time.Second - lookAgainAfter)
		w.wantClosings(e)
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
		require.NoError(t, w.StateSent(t.Context(), s, "$crossed"))
		time.Sleep(lookAgainAfter + time.Millisecond)
		synctest.Wait()
		full()
		require.NoError(t, w.Refresh(t.Context(), w.hash(e)))
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

// The stream reports that each closing event replaced its original, possibly before the roomserver has answered.
func TestStreamTellsOfTheClosingEvent(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		e := w.state("key", 10*time.Second)
		s, _ := e.State()
		told := false
		w.roomserver.set(hooks{afterClaim: func(Event) error {
			w.roomserver.set(hooks{look: func(Event) error { t.Error("the engine asks whether the event was replaced"); return nil }})
			told = true
			return errors.Join(
				w.StateRemoved(t.Context(), e.ID), w.StateChanged(t.Context(), s, "$closing"), w.RoomChanged(t.Context(), s.RoomID),
			)
		}})
		time.Sleep(11 * time.Second)
		w.wantClosings(e)
		require.True(t, told)
	})
}

// On PostgreSQL the stream reports a change before the roomserver has committed it.
func TestStreamIsFasterThanTheRoomserver(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		e, kept := w.state("key", time.Hour), w.state("kept", 10*time.Second)
		s, _ := e.State()
		require.NoError(t, w.StateRemoved(t.Context(), e.ID))
		require.NoError(t, w.StateRemoved(t.Context(), kept.ID))
		require.NoError(t, w.Refresh(t.Context(), w.hash(e)))
		w.roomserver.sendRemote(s.RoomID, s.Type, s.Key)
		time.Sleep(lookAgainAfter)
		synctest.Wait()
		require.Zero(t, testutil.ToFloat64(w.metrics.closings.WithLabelValues("expired")))
		require.EqualValues(t, 1, testutil.ToFloat64(w.metrics.drops.WithLabelValues("replaced")))
		require.ErrorIs(t, w.Refresh(t.Context(), w.hash(e)), ErrNotFound)
		time.Sleep(10 * time.Second)
		w.wantClosings(kept)
	})
}

func TestDrops(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		redacted, purged, left := w.message("!a", time.Hour), w.message("!b", time.Hour), w.message("!c", time.Hour)
		time.Sleep(time.Second)
		when := time.Now()
		time.Sleep(time.Second)
		back, kept := w.message("!c", time.Hour), w.message("!a", time.Hour)
		w.DropEvent(t.Context(), redacted.ID, Redacted)
		w.DropEvent(t.Context(), "$unknown", Redacted)
		w.DropRoom(t.Context(), "!b")
		w.DropSender(t.Context(), "!c", "@alice:example.org", when)
		w.DropSender(t.Context(), "!a", "@bob:example.org", time.Now())
		for _, e := range []Event{redacted, purged, left} {
			require.ErrorIs(t, w.Refresh(t.Context(), w.hash(e)), ErrNotFound)
		}
		for _, e := range []Event{back, kept} {
			require.NoError(t, w.Refresh(t.Context(), w.hash(e)))
			time.Sleep(time.Second)
		}
		require.Equal(t, 2, w.store.len())
		// A sender who left is told so once at /end, and then the token is unknown. The token of a redacted event is unknown at once.
		var dropped *DropError
		require.ErrorAs(t, w.End(t.Context(), w.hash(left)), &dropped)
		require.Equal(t, SenderGone, dropped.Reason)
		require.ErrorIs(t, w.End(t.Context(), w.hash(left)), ErrNotFound)
		require.ErrorIs(t, w.End(t.Context(), w.hash(redacted)), ErrNotFound)
		time.Sleep(2 * time.Hour)
		w.wantClosings(back, kept)
	})
}

// The stream reports that the sender has left while the closing event is being built: a caller of End is told so, once.
func TestSenderLeavesDuringEnd(t *testing.T) {
	for _, failed := range []error{&DropError{Reason: SenderGone}, errFault} {
		inWorld(t, Config{}, func(t *testing.T, w *world) {
			e := w.message("!a", time.Hour)
			time.Sleep(time.Second)
			w.roomserver.set(hooks{beforeClaim: func(Event) error {
				w.DropSender(t.Context(), "!a", "@alice:example.org", time.Now())
				return failed
			}})
			var dropped *DropError
			require.ErrorAs(t, w.End(t.Context(), w.hash(e)), &dropped)
			require.Equal(t, SenderGone, dropped.Reason)
			require.ErrorIs(t, w.End(t.Context(), w.hash(e)), ErrNotFound)
			require.True(t, w.index.Empty())
		})
	}
}

// Each token and delay ID may be used as often as the limit says, whatever happens to other ones.
func TestTokensAreLimited(t *testing.T) {
	const interval = 15 * time.Minute
	inWorld(t, Config{TokenLimit: RateLimit{Threshold: 4, Cooloff: time.Hour}}, func(t *testing.T, w *world) {
		limited := func(allow func() (bool, time.Duration)) {
			t.Helper()
			for i := range 6 {
				known, wait := allow()
				require.True(t, known)
				require.Equal(t, i >= 4, wait == interval, "request %d: %s", i, wait)
				require.Equal(t, i < 4, wait == 0, "request %d: %s", i, wait)
			}
		}
		ofToken := func(e Event) func() (bool, time.Duration) {
			return func() (bool, time.Duration) { return w.Allow(w.hash(e)) }
		}
		first, other := w.message("!a", 2*time.Hour), w.message("!a", 2*time.Hour)
		limited(ofToken(first))
		limited(ofToken(other))
		delayID := w.schedule(leave("key"), "left", 2*time.Hour)
		limited(func() (bool, time.Duration) { return w.AllowDelayed(delayID) })
		time.Sleep(interval)
		_, wait := w.Allow(w.hash(first))
		require.Zero(t, wait)
		_, wait = w.Allow(w.hash(first))
		require.Equal(t, interval, wait)
		require.NoError(t, w.End(t.Context(), w.hash(first)))
		known, wait := w.Allow(w.hash(first))
		require.False(t, known)
		require.Zero(t, wait, "unknown tokens are limited by address")
		time.Sleep(2 * sweepPause) // its row is deleted
		limited(ofToken(w.message("!a", time.Hour)))
		w.restart(time.Second)
		limited(ofToken(other))
	})
}

func TestTokensOfSendersWhoLeftAreForgotten(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		long, short := w.message("!a", time.Hour), w.message("!a", time.Minute)
		time.Sleep(time.Second)
		w.DropSender(t.Context(), "!a", "@alice:example.org", time.Now())
		time.Sleep(time.Minute)
		require.True(t, w.known(w.hash(long)))
		require.False(t, w.known(w.hash(short)), "not after its deadline")
		time.Sleep(refusedFor)
		require.False(t, w.known(w.hash(long)))
		require.True(t, w.index.Empty())
	})
}

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

// An attempt fails in passing, and the room's next event is claimed before the process dies. The next process still keeps the order.
func TestOrderAfterACrash(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		first, second := w.message("!room", 10*time.Second), w.message("!room", 11*time.Second)
		third, elsewhere := w.message("!room", 12*time.Second), w.message("!elsewhere", 9*time.Second)
		w.roomserver.set(hooks{
			beforeClaim: func(e Event) error {
				if e.ID == second.ID {
					return nil
				}
				return errFault
			},
			afterClaim: fails,
		})
		time.Sleep(20 * time.Second)
		synctest.Wait()
		w.restart(0)
		w.wantClosings()
		w.roomserver.set(hooks{})
		w.restart(0)
		synctest.Wait()
		ids := map[string][]string{} // by room, because rooms do not wait for one another
		for _, c := range w.roomserver.closings() {
			ids[c.roomID] = append(ids[c.roomID], c.closes)
		}
		require.Equal(t, map[string][]string{"!room": {first.ID, second.ID, third.ID}, "!elsewhere": {elsewhere.ID}}, ids)
	})
}

func TestAfterTheClaimTheSameEventIsSentAgain(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		w.roomserver.set(hooks{afterClaim: fails})
		e := w.state("key", 10*time.Second)
		time.Sleep(time.Minute)
		require.Equal(t, 1, w.roomserver.attempts(), "a second closing event was built")
		require.Error(t, w.End(t.Context(), w.hash(e)))
		w.restart(time.Second)
		require.Equal(t, 1, w.roomserver.attempts())
		w.roomserver.set(hooks{})
		time.Sleep(time.Minute)
		w.wantClosings(e)
		require.Equal(t, "$closing1", w.roomserver.closings()[0].eventID)
		require.Zero(t, w.store.len())
	})
}

// After a claim failed, it may be written or not. The engine finds out before it does anything else.
func TestUnsureClaims(t *testing.T) {
	for _, written := range []bool{false, true} {
		inWorld(t, Config{}, func(t *testing.T, w *world) {
			claimed := false
			w.store.set(written, func(operation string) error {
				if claimed = claimed || operation == "claim"; claimed {
					return errFault
				}
				return nil
			})
			e := w.message("!room", 10*time.Second)
			time.Sleep(30 * time.Second)
			w.wantClosings()
			built := w.roomserver.attempts()
			w.store.set(false, nil)
			time.Sleep(time.Minute)
			w.wantClosings(e)
			if written {
				require.Equal(t, built, w.roomserver.attempts(), "a claimed event was built again")
				require.Equal(t, "$closing1", w.roomserver.closings()[0].eventID)
			}
			require.Zero(t, w.store.len())
		})
	}
}

func TestFailedRefreshPromisesNothing(t *testing.T) {
	for _, written := range []bool{false, true} {
		inWorld(t, Config{}, func(t *testing.T, w *world) {
			e := w.message("!room", 10*time.Second)
			time.Sleep(5 * time.Second)
			w.store.set(written, func(string) error { return errFault })
			require.ErrorIs(t, w.Refresh(t.Context(), w.hash(e)), errFault)
			w.store.set(false, nil)
			time.Sleep(11 * time.Second)
			w.wantClosings(e)
		})
	}
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

func TestRowsThatCouldNotBeDeleted(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		closed, dropped := w.message("!room", 10*time.Second), w.message("!room", time.Hour)
		w.store.set(false, func(operation string) error {
			if operation == "delete" || operation == "drop" {
				return errFault
			}
			return nil
		})
		require.NoError(t, w.End(t.Context(), w.hash(closed)), "the closing event is in the room")
		w.DropEvent(t.Context(), dropped.ID, Redacted)
		require.ErrorIs(t, w.Refresh(t.Context(), w.hash(dropped)), ErrNotFound)
		require.Equal(t, 2, w.store.len())
		time.Sleep(time.Minute)
		require.Error(t, w.Settle(t.Context()), "a crash could bring the dropped timer back")
		w.store.set(false, func(operation string) error {
			if operation == "delete" {
				return errFault
			}
			return nil
		})
		require.NoError(t, w.Settle(t.Context()), "the closed event stays closed")
		require.Equal(t, 1, w.store.len())
		w.store.set(false, nil)
		time.Sleep(time.Minute)
		require.Zero(t, w.store.len())
		require.NoError(t, w.Settle(t.Context()))
		w.wantClosings(closed)
		require.EqualValues(t, 1, testutil.ToFloat64(w.metrics.closings.WithLabelValues("ended")))
	})
}

// The stream can report the end of an event before the roomserver has answered the event's sender.
func TestDroppedWhilePending(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		e := Event{ID: "$x", RoomID: "!room", Type: "m", Sender: "@alice:example.org"}
		p, err := w.Begin(t.Context(), e, time.Second, false)
		require.NoError(t, err)
		w.roomserver.send(e)
		w.DropEvent(t.Context(), e.ID, Redacted)
		p.Activate(true)
		require.ErrorIs(t, w.Refresh(t.Context(), w.hash(e)), ErrNotFound)
		require.Zero(t, w.store.len())
		time.Sleep(time.Minute)
		w.wantClosings()
	})
}

func TestLimitPerUser(t *testing.T) {
	inWorld(t, Config{MaxRunningPerUser: 2}, func(t *testing.T, w *world) {
		first := w.state("key", 10*time.Second)
		w.message("!room", time.Minute)
		time.Sleep(4 * time.Second)
		another := Event{ID: "$another", RoomID: "!room", Type: "m", Sender: "@alice:example.org"}
		_, err := w.Begin(t.Context(), another, time.Second, false)
		var limit *LimitError
		require.ErrorAs(t, err, &limit)
		require.Equal(t, 6*time.Second, limit.RetryAfter)
		_, err = w.Begin(t.Context(), Event{ID: "$bob", Sender: "@bob:example.org"}, time.Second, false)
		require.NoError(t, err, "another user's limit")
		_, err = w.Begin(t.Context(), Event{ID: "$bridge", Sender: "@alice:example.org"}, time.Second, true)
		require.NoError(t, err, "exempt")
		w.DropEvent(t.Context(), first.ID, Redacted)
		_, err = w.Begin(t.Context(), another, time.Second, false)
		require.Error(t, err, "the exempt user's timer counts")
	})
	inWorld(t, Config{MaxRunningPerUser: 2}, func(t *testing.T, w *world) {
		w.state("key", 10*time.Second)
		w.message("!room", time.Minute)
		for range 5 {
			w.state("key", 10*time.Second) // replaces the first, so it does not count
		}
	})
}

func TestRestart(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		third, first, second := w.message("!room", 30*time.Second), w.message("!room", 10*time.Second), w.message("!room", 20*time.Second)
		later := w.message("!room", 2*time.Minute)
		w.restart(time.Minute)
		w.wantClosings(first, second, third)
		require.NoError(t, w.Refresh(t.Context(), w.hash(later)))
		time.Sleep(2*time.Minute - time.Millisecond)
		w.wantClosings(first, second, third)
		time.Sleep(time.Millisecond)
		w.wantClosings(first, second, third, later)
	})
}

func TestRestartGrace(t *testing.T) {
	inWorld(t, Config{RestartGrace: 30 * time.Second}, func(t *testing.T, w *world) {
		overdue, alive, later := w.message("!room", 10*time.Second), w.message("!room", 20*time.Second), w.message("!room", 100*time.Second)
		w.restart(time.Minute)
		time.Sleep(29 * time.Second)
		w.wantClosings()
		require.NoError(t, w.Refresh(t.Context(), w.hash(alive)))
		time.Sleep(2 * time.Second)
		w.wantClosings(overdue)
		time.Sleep(18 * time.Second)
		w.wantClosings(overdue, later, alive)
	})
}

// The closing event of an expired event bears the deadline, and never an earlier time, whenever it is built.
func TestTimeOfTheClosingEvent(t *testing.T) {
	const grace = 30 * time.Second
	inWorld(t, Config{RestartGrace: grace}, func(t *testing.T, w *world) {
		time.Sleep(300 * time.Microsecond) // the deadlines are not whole milliseconds
		sentAt := func(e Event) time.Time {
			t.Helper()
			synctest.Wait()
			for _, c := range w.roomserver.closings() {
				if c.closes == e.ID {
					return c.sent
				}
			}
			t.Fatal("no closing event")
			return time.Time{}
		}
		first := time.Now()
		late, refreshed := w.message("!a", 10*time.Second), w.message("!b", 10*time.Second)
		w.roomserver.set(hooks{beforeClaim: func(Event) error {
			if time.Since(first) < 12*time.Second {
				return errFault
			}
			return nil
		}})
		time.Sleep(5 * time.Second)
		require.NoError(t, w.Refresh(t.Context(), w.hash(refreshed)))
		time.Sleep(15 * time.Second)
		deadline := first.Add(10 * time.Second)
		require.False(t, sentAt(late).Before(deadline))
		require.Less(t, sentAt(late).Sub(deadline), time.Millisecond)
		require.Equal(t, w.stored(first.Add(15*time.Second)), sentAt(refreshed))

		atOnce := w.message("!a", time.Minute)
		time.Sleep(time.Second)
		require.NoError(t, w.End(t.Context(), w.hash(atOnce)))
		require.Equal(t, w.stored(time.Now()), sentAt(atOnce))

		// The deadline of a timer that expired while the server was down was put off. Other timers kept theirs.
		second := time.Now()
		overdue, later := w.message("!a", 10*time.Second), w.message("!b", 200*time.Second)
		w.restart(time.Minute)
		third := time.Now()
		time.Sleep(5 * time.Minute)
		require.Equal(t, w.stored(third.Add(grace)), sentAt(overdue))
		require.Equal(t, w.stored(second.Add(200*time.Second)), sentAt(later))
	})
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		deadline := time.Now().Add(10 * time.Second)
		w.message("!room", 10*time.Second)
		w.restart(time.Hour)
		synctest.Wait()
		require.Equal(t, w.stored(deadline), w.roomserver.closings()[0].sent)
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

// A crash can leave an event stored, but not the current state until the roomserver goes on. Such an event must not count as replaced,
// because it would lose its timer.
func TestEventThatTheRoomserverHadNotFinished(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		e := w.begin("key", time.Second)
		w.roomserver.store(e)
		w.restart(time.Second)
		w.wantClosings(e)
	})
}

// A slow room delays no other room.
func TestRoomsDoNotWaitForOneAnother(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		w.roomserver.set(hooks{beforeClaim: func(e Event) error {
			if e.RoomID == "!slow" {
				time.Sleep(8 * time.Second)
			}
			return nil
		}})
		var slow, fast []Event
		for i := range 5 {
			slow = append(slow, w.message("!slow", 10*time.Second-time.Duration(5-i)*time.Millisecond))
			fast = append(fast, w.message(fmt.Sprintf("!fast%d", i), 10*time.Second))
		}
		time.Sleep(10 * time.Second)
		synctest.Wait()
		require.Len(t, w.roomserver.closings(), len(fast))
		time.Sleep(100 * time.Second)
		synctest.Wait()
		closings := w.roomserver.closings()
		require.Len(t, closings, len(fast)+len(slow))
		for i, c := range closings[len(fast):] {
			require.Equal(t, slow[i].ID, c.closes)
		}
	})
}

// The next timer of a room does not wait until the previous row is deleted.
func TestDeletionsHoldUpNobody(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		w.store.setDeleteTakes(10 * time.Second)
		first, second := w.message("!room", 10*time.Second), w.message("!room", 11*time.Second)
		time.Sleep(12 * time.Second)
		synctest.Wait()
		w.wantClosings(first, second)
		require.Equal(t, 2, w.store.len())
		time.Sleep(20 * time.Second)
		synctest.Wait()
		require.Zero(t, w.store.len())
	})
}

// The rows of a mass expiry are deleted together.
func TestDeletedTogether(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		deletions := 0
		w.store.set(false, func(operation string) error {
			if operation == "delete" {
				deletions++
			}
			return nil
		})
		for i := range 10 {
			w.message(fmt.Sprintf("!room%d", i%3), 10*time.Second)
		}
		time.Sleep(10 * time.Second)
		w.wantNoRows()
		require.Equal(t, 1, deletions)

		w.message("!room", 10*time.Second)
		time.Sleep(10 * time.Second)
		synctest.Wait()
		require.Equal(t, 1, w.store.len())
		stopping := time.Now()
		w.Stop()
		require.Zero(t, w.store.len(), "collected rows are deleted when the engine stops")
		require.Zero(t, time.Since(stopping), "stopping does not wait for more rows")
	})
}

// While the roomserver has a room's event, exactly one further event is built and claimed. The roomserver gets it after the first.
func TestTurnsOverlap(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		w.roomserver.set(hooks{beforeClaim: takes(600 * time.Millisecond), afterClaim: takes(time.Second)})
		start := time.Now()
		var events []Event
		for i := range 4 {
			events = append(events, w.message("!room", 10*time.Second+time.Duration(i)*time.Millisecond))
		}
		time.Sleep(11300 * time.Millisecond)
		synctest.Wait()
		require.Equal(t, 2, w.roomserver.attempts())
		require.ErrorIs(t, w.Refresh(t.Context(), w.hash(events[1])), ErrNotFound, "claimed while the first is with the roomserver")
		require.NoError(t, w.Refresh(t.Context(), w.hash(events[2])))
		w.wantClosings()
		time.Sleep(10 * time.Second)
		w.wantClosings(events[0], events[1], events[3])
		time.Sleep(10 * time.Second)
		w.wantClosings(events[0], events[1], events[3], events[2])
		var at []time.Duration
		for _, c := range w.roomserver.closings() {
			at = append(at, c.at.Sub(start))
		}
		// The fourth turn begins after the third turned out to be refreshed and the second is over.
		require.Equal(t, []time.Duration{
			11600 * time.Millisecond, 12600 * time.Millisecond, 14200 * time.Millisecond, 22902 * time.Millisecond,
		}, at)
	})
}

// If early events fork the event graph, only some turns are early, because each merge makes the roomserver read all state. Events that
// users send meanwhile make no difference.
func TestTurnsSeldomOverlap(t *testing.T) {
	for _, users := range []bool{false, true} {
		inWorld(t, Config{MaxRunningPerUser: 200}, func(t *testing.T, w *world) {
			w.earlyEvery = lanes.EarlyEvery
			w.restart(0)
			begin := takes(600 * time.Millisecond)
			w.roomserver.set(hooks{afterClaim: takes(time.Second), beforeClaim: func(e Event) error {
				if users {
					w.roomserver.send(Event{ID: "$user's before " + e.ID, RoomID: e.RoomID})
				}
				return begin(e)
			}})
			const n = 2*lanes.EarlyEvery*lanes.EarlyEvery + 1
			for i := range n {
				w.message("!room", 10*time.Second+time.Duration(i)*time.Millisecond)
			}
			time.Sleep(5 * time.Minute)
			closings := w.roomserver.closings()
			require.Len(t, closings, n)
			var early []int
			for i := 1; i < n; i++ {
				took := closings[i].at.Sub(closings[i-1].at)
				if took != 1600*time.Millisecond {
					require.Equal(t, time.Second, took, i)
					early = append(early, i)
				}
			}
			require.Equal(t, []int{1, 9, 17, 25, 33, 41, 49, 57, 65}, early[:9], "one in eight while many wait")
			require.Equal(t, []int{n - 5, n - 1}, early[len(early)-2:], "one in four at the end")
		})
	}
}

// If early events do not fork the event graph, because the previous event is in the room by then, every turn is early.
func TestTurnsBuiltUponOneAnother(t *testing.T) {
	const n = 2 * lanes.EarlyEvery * lanes.EarlyEvery
	for name, add := range map[string]func(w *world, in time.Duration){
		"closing events": func(w *world, in time.Duration) { w.message("!room", in) },
		"delayed events": func(w *world, in time.Duration) {
			w.schedule(Event{RoomID: "!room", Type: "m.room.message", Sender: alice}, in.String(), in)
		},
	} {
		t.Run(name, func(t *testing.T) {
			inWorld(t, Config{MaxRunningPerUser: n, MaxScheduledPerUser: n}, func(t *testing.T, w *world) {
				w.earlyEvery = lanes.EarlyEvery
				w.restart(0)
				w.roomserver.set(hooks{beforeClaim: takes(1600 * time.Millisecond), afterClaim: takes(time.Second)})
				start := time.Now()
				for i := range n {
					add(w, 10*time.Second+time.Duration(i)*time.Millisecond)
				}
				time.Sleep(10 * time.Minute)
				var at []time.Duration
				for _, c := range w.roomserver.closings() {
					at = append(at, c.at.Sub(start))
				}
				for _, e := range w.roomserver.sent() {
					at = append(at, e.at.Sub(start))
				}
				require.Len(t, at, n)
				for i, at := range at {
					require.Equal(t, 12600*time.Millisecond+time.Duration(i)*1600*time.Millisecond, at, i)
				}
			})
		})
	}
}

// Delayed events and closing events take turns in the same lane.
func TestTurnsOfDelayedEvents(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		w.roomserver.set(hooks{beforeClaim: takes(600 * time.Millisecond), afterClaim: takes(time.Second)})
		start := time.Now()
		first := w.message("!room", 10*time.Second)
		for i := range 2 {
			delay := 10*time.Second + time.Duration(i+1)*time.Millisecond
			w.schedule(Event{RoomID: "!room", Type: "m.room.message", Sender: alice}, fmt.Sprint(i), delay)
		}
		last := w.message("!room", 10*time.Second+3*time.Millisecond)
		time.Sleep(time.Minute)
		w.wantClosings(first, last)
		w.wantSent("0", "1")
		var at []time.Duration
		for _, c := range w.roomserver.closings() {
			at = append(at, c.at.Sub(start))
		}
		for _, e := range w.roomserver.sent() {
			at = append(at, e.at.Sub(start))
		}
		require.Equal(t, []time.Duration{
			11600 * time.Millisecond, 14600 * time.Millisecond, 12600 * time.Millisecond, 13600 * time.Millisecond,
		}, at)
	})
}

// A timer that becomes due while its room's queue is empty, but an event is with the roomserver, is sent after that event.
func TestTurnOfWhatComesLater(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		w.roomserver.set(hooks{beforeClaim: takes(600 * time.Millisecond), afterClaim: takes(time.Second)})
		start := time.Now()
		first, second := w.message("!room", 10*time.Second), w.message("!room", 10*time.Second+time.Millisecond)
		third := w.message("!room", 11700*time.Millisecond) // due while the first is in the room, and the second with the roomserver
		time.Sleep(time.Minute)
		w.wantClosings(first, second, third)
		require.Equal(t, 13600*time.Millisecond, w.roomserver.closings()[2].at.Sub(start))
	})
}

// An event that is given to the roomserver again also waits for its turn, and the next one waits for it.
func TestTurnOfAnotherAttempt(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		w.roomserver.set(hooks{afterClaim: fails})
		first := w.message("!room", 10*time.Second)
		time.Sleep(10 * time.Second)
		synctest.Wait()
		w.roomserver.set(hooks{afterClaim: takes(time.Second)})
		second := w.message("!room", firstPause-time.Millisecond)
		third := w.message("!room", firstPause+time.Second) // due after the retry has begun
		time.Sleep(time.Minute)
		w.wantClosings(second, first, third)
		closings := w.roomserver.closings()
		require.Equal(t, time.Second, closings[1].at.Sub(closings[0].at))
		require.Equal(t, closings[1].at, closings[2].built)
	})
}

// An event that may influence whether others are allowed is in the room before those are built.
func TestTurnsOfWhatDecides(t *testing.T) {
	for _, test := range []struct {
		eventType string
		key       *string
		begins    time.Duration // after the first is due
	}{
		{"m.room.power_levels", new(string), 1600 * time.Millisecond},
		{"m.room.redaction", nil, 1600 * time.Millisecond},
		{"m.room.message", nil, 600 * time.Millisecond},
		{"m.call.member", new(string), 600 * time.Millisecond},
	} {
		t.Run(test.eventType, func(t *testing.T) {
			inWorld(t, Config{}, func(t *testing.T, w *world) {
				w.roomserver.set(hooks{beforeClaim: takes(600 * time.Millisecond), afterClaim: takes(time.Second)})
				start := time.Now()
				w.send(Event{ID: "$first", RoomID: "!room", Type: test.eventType, StateKey: test.key, Sender: "@alice:example.org"}, 10*time.Second)
				second := w.message("!room", 10*time.Second+time.Millisecond)
				time.Sleep(time.Minute)
				w.wantClosings(Event{ID: "$first"}, second)
				require.Equal(t, 10*time.Second+test.begins, w.roomserver.closings()[1].built.Sub(start))
			})
		})
	}
}

// An event that waits for its turn when the engine stops is sent by the next process as it was claimed.
func TestStoppedBeforeItsTurn(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		first := true
		w.roomserver.set(hooks{afterClaim: func(Event) error {
			if first {
				first = false
				time.Sleep(time.Hour)
				return errFault
			}
			return nil
		}})
		a, b := w.message("!room", 10*time.Second), w.message("!room", 11*time.Second)
		time.Sleep(12 * time.Second)
		synctest.Wait()
		require.Equal(t, 2, w.roomserver.attempts())
		stopping := time.Now()
		go w.Stop()
		time.Sleep(stopPatience)
		require.Less(t, time.Since(stopping), time.Minute)
		w.wantClosings()
		time.Sleep(time.Hour)
		w.start(w.cfg)
		w.wantClosings(a, b)
		require.Equal(t, 2, w.roomserver.attempts(), "no event is built again")
	})
}

// With more rooms than places, those with the earliest deadlines are first.
func TestEarliestRoomsFirst(t *testing.T) {
	inWorld(t, Config{MaxRunningPerUser: 3 * lanes.Places}, func(t *testing.T, w *world) {
		w.roomserver.set(hooks{beforeClaim: takes(time.Second)})
		const rooms = 3 * lanes.Places
		for i := range rooms {
			w.message(fmt.Sprintf("!room%d", i), time.Minute+time.Duration(rooms-i)*time.Millisecond)
		}
		w.restart(2 * time.Minute)
		time.Sleep(time.Minute)
		synctest.Wait()
		closings := w.roomserver.closings()
		require.Len(t, closings, rooms)
		for i, c := range closings {
			var n int
			_, err := fmt.Sscanf(c.closes, "$event%d", &n)
			require.NoError(t, err)
			require.InDelta(t, rooms-i, n, lanes.Places, "of these %d are served at the same time", lanes.Places)
		}
	})
}

func TestRepeatedContent(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		e := w.state("key", time.Hour)
		require.True(t, w.Running(e.ID, e.Sender))
		require.False(t, w.Running(e.ID, "@bob:example.org"))
		require.NoError(t, w.Restart(t.Context(), e.ID, 10*time.Second), "before the scheduled wake")
		time.Sleep(9 * time.Second)
		require.NoError(t, w.Refresh(t.Context(), w.hash(e)), "with the new duration")
		time.Sleep(9 * time.Second)
		w.wantClosings()
		time.Sleep(time.Second)
		w.wantClosings(e)
		require.ErrorIs(t, w.Restart(t.Context(), e.ID, time.Second), ErrNotFound)
		require.False(t, w.Running(e.ID, e.Sender))
	})
}

// A send first finishes a half-done closing event, so that this does not arrive after it. If it cannot, it does not wait longer.
func TestLockStateFinishesClosings(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		w.roomserver.set(hooks{afterClaim: fails})
		old := w.state("key", 10*time.Second)
		time.Sleep(11 * time.Second)
		s, _ := old.State()
		unlock, err := w.LockState(t.Context(), s)
		require.NoError(t, err)
		unlock()
		w.wantClosings()
		w.roomserver.set(hooks{})
		e := w.state("key", time.Hour)
		w.wantClosings(old)
		require.Equal(t, e.ID, w.roomserver.current(s))
		time.Sleep(time.Minute)
		w.wantClosings(old)
		require.Equal(t, e.ID, w.roomserver.current(s))
	})
}

func TestLockStateObeysContext(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		s := StateKey{"!room", "m", "key"}
		unlock, err := w.LockState(t.Context(), s)
		require.NoError(t, err)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, err = w.LockState(ctx, s)
		require.ErrorIs(t, err, context.DeadlineExceeded)
		unlock()
		require.Zero(t, w.states.Len(), "unused locks are removed")
	})
}

func TestStopIsPatientAndRepeatable(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		w.roomserver.set(hooks{beforeClaim: takes(time.Second)})
		e := w.message("!room", 10*time.Second)
		time.Sleep(10*time.Second + time.Millisecond)
		w.Stop()
		w.wantClosings(e)
		w.Stop()
	})
	New(Config{}, newMemoryStore(), newFakeRoomserver(), &Tokens{}).Stop() // never started
}

// Whenever and however often a process is stopped, the next one finishes the rest, and nothing is closed twice. Stop is called by several
// goroutines while closing events are built, claimed and sent.
func TestStopAtAnyMoment(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		w.roomserver.set(hooks{beforeClaim: takes(7 * time.Millisecond), afterClaim: takes(11 * time.Millisecond)})
		const events = 40
		closed := map[string]bool{}
		for i := range events {
			w.message(fmt.Sprintf("!room%d", i%5), time.Duration(i+1)*3*time.Millisecond)
		}
		for life := range 2 * events {
			time.Sleep(time.Duration(life) * time.Millisecond)
			var stops sync.WaitGroup
			for range 3 {
				stops.Go(w.Stop)
			}
			stops.Wait()
			w.Stop()
			closings := len(w.roomserver.closings())
			time.Sleep(time.Second)
			require.Len(t, w.roomserver.closings(), closings, "the engine went on after Stop")
			w.start(w.cfg)
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		for _, c := range w.roomserver.closings() {
			require.False(t, closed[c.closes], "closed twice")
			closed[c.closes] = true
		}
		require.Len(t, closed, events)
		require.Zero(t, w.store.len())
	})
	unstarted := New(Config{}, newMemoryStore(), newFakeRoomserver(), &Tokens{})
	unstarted.Stop()
	require.NoError(t, unstarted.Start(t.Context()))
	unstarted.Stop()
	unstarted.Stop()
}

// Rows with no digest, or with one under another key, are read whole.
func TestOtherDigests(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		none := w.message("!room", 20*time.Second)
		clear(w.store.digests)
		other := w.message("!room", 20*time.Second)
		token := w.hash(other)
		w.secret = "another"
		w.restart(time.Second)
		own := w.message("!room", 20*time.Second)
		require.True(t, w.known(token), "tokens are valid as long as their events run")
		w.restart(time.Second)
		for _, e := range []Event{other, none, own} {
			require.Len(t, w.timersIn(e.RoomID), 3)
		}
		w.DropSender(t.Context(), "!room", none.Sender, time.Now())
		w.wantNoRows()
	})
}

func TestStartFailsWithTheDatabase(t *testing.T) {
	store := newMemoryStore()
	store.set(false, func(string) error { return errFault })
	require.ErrorIs(t, New(Config{}, store, newFakeRoomserver(), &Tokens{}).Start(t.Context()), errFault)
}

// The wall clock may step: while the process lives, only elapsed time counts.
func TestTokens(t *testing.T) {
	a, err := NewTokens([]byte("a"))
	require.NoError(t, err)
	again, err := NewTokens([]byte("a"))
	require.NoError(t, err)
	b, err := NewTokens([]byte("b"))
	require.NoError(t, err)
	require.Len(t, a.Token("$x"), 43)
	require.Equal(t, a.Token("$x"), again.Token("$x"))
	require.NotEqual(t, a.Token("$x"), a.Token("$y"))
	require.NotEqual(t, a.Token("$x"), b.Token("$x"))
	require.NotEqual(t, HashToken("x"), HashToken("y"))
}

func TestDropErrorSaysWhy(t *testing.T) {
	err := fmt.Errorf("closing: %w", &DropError{Reason: Forbidden, Cause: errFault})
	require.ErrorIs(t, err, errFault)
	require.Contains(t, err.Error(), "forbidden")
	require.True(t, isFinal(err))
	require.False(t, isFinal(errors.New("x")))
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

// A claimed event is sent whatever the stream reports meanwhile, because it may be in the room already.
func TestDropSparesWhatIsClaimed(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		e := w.message("!room", 10*time.Second)
		w.roomserver.set(hooks{afterClaim: fails})
		time.Sleep(10 * time.Second)
		synctest.Wait()
		w.DropEvent(t.Context(), e.ID, Redacted)
		w.roomserver.set(hooks{})
		time.Sleep(time.Minute)
		w.wantClosings(e)
	})
}

// A write that fails may have happened. Its row must not come back with the next start.
func TestRowsThatNobodyKnowsOf(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		e := w.message("!room", 10*time.Second)
		failing := func(operation string) func(string) error {
			return func(o string) error {
				if o == operation {
					return errFault
				}
				return nil
			}
		}
		w.store.set(true, failing("insert"))
		_, err := w.Begin(t.Context(), Event{ID: "$refused", RoomID: "!room", Sender: "@alice:example.org"}, time.Second, false)
		require.ErrorIs(t, err, errFault)
		require.Equal(t, 1, w.store.len())

		w.store.set(true, failing("claim"))
		time.Sleep(10 * time.Second)
		synctest.Wait()
		w.DropEvent(t.Context(), e.ID, Redacted)
		require.Zero(t, w.store.len())
		w.restart(0)
		w.wantClosings()
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

// A client that repeats a message after a crash gets the same event, whatever has become of it.
func TestRepeatedRequest(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		begin := func(n byte) Event {
			e := Event{ID: fmt.Sprintf("$event%d", n), RoomID: "!room", Type: "m", Sender: "@alice:example.org"}
			sent := e
			sent.Request = &Request{Hash: RequestHash{n}, Signed: SignedEvent{EventID: e.ID, PDU: []byte(e.ID)}}
			_, err := w.Begin(t.Context(), sent, time.Minute, false)
			require.NoError(t, err)
			return e
		}
		queued, stored, sent := begin(1), begin(2), begin(3)
		w.roomserver.store(stored)
		w.roomserver.send(sent)
		w.restart(time.Second)
		for n, e := range map[byte]Event{1: queued, 2: stored, 3: sent} {
			for range 2 {
				eventID, err := w.Sent(t.Context(), RequestHash{n})
				require.NoError(t, err)
				require.Equal(t, e.ID, eventID)
				require.True(t, w.roomserver.has(e.ID), "the request was answered, and the event is not in its room")
			}
		}
		eventID, err := w.Sent(t.Context(), RequestHash{4})
		require.NoError(t, err)
		require.Empty(t, eventID)

		// The request is remembered, whether the event is closed or not, until clients no longer repeat it.
		require.NoError(t, w.End(t.Context(), w.hash(sent)))
		eventID, err = w.Sent(t.Context(), RequestHash{3})
		require.NoError(t, err)
		require.Equal(t, sent.ID, eventID)
		time.Sleep(3 * retriedFor)
		w.mu.Lock()
		defer w.mu.Unlock()
		tm, eventID := w.index.OfRequest(w.tokens.names.request(RequestHash{3}))
		require.Nil(t, tm)
		require.Empty(t, eventID)
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
		require.Equal(t, firstPause, limit.RetryAfter, "when the first of them is attempted again")
		eventID, err := w.Sent(t.Context(), RequestHash{0})
		require.NoError(t, err)
		require.Equal(t, "$event0", eventID)
		require.True(t, w.roomserver.has(eventID))
		time.Sleep(givenUpAfter * lastPause)
		require.Zero(t, w.store.len())
		require.Len(t, w.roomserver.closings(), 1)
	})
}
