package keeper

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/rtc/livekit"
)

// What happens if something dies, hangs or comes at the wrong moment.

func TestFaults(t *testing.T) {
	for name, test := range map[string]func(t *testing.T, w *world){
		"LiveKit is away for a shorter time than the delay": func(t *testing.T, w *world) {
			m := w.connected(leaveOf(1), 5*time.Minute)
			time.Sleep(10*time.Minute + time.Second)
			w.restartLiveKit(4*time.Minute + 30*time.Second)
			time.Sleep(silentPause)
			require.True(t, w.sfu.enter(m.Participant, livekit.Active), "the room is there again")
			time.Sleep(time.Hour)
			w.wantPhase(m, connected)
		},
		"LiveKit is away for longer than the delay": func(t *testing.T, w *world) {
			m := w.connected(leaveOf(1), 5*time.Minute)
			time.Sleep(10 * time.Minute)
			w.restartLiveKit(6 * time.Minute)
			require.Equal(t, "expired", w.timers.of(m.timer).ended)
			require.LessOrEqual(t, w.timers.of(m.timer).endedAt.Sub(w.sfu.toldAt(m.Participant)), 5*time.Minute+fresh)
		},
		"LiveKit is killed while somebody crashes": func(t *testing.T, w *world) {
			m, other := w.connected(leaveOf(1), time.Hour), w.connected(leaveOf(2), time.Hour)
			time.Sleep(10 * time.Minute)
			w.restartLiveKit(time.Minute)
			time.Sleep(silentPause)
			require.True(t, w.sfu.enter(other.Participant, livekit.Active))
			time.Sleep(grace)
			w.wantPhase(m, over)
			require.Equal(t, "finished", w.timers.of(m.timer).ended)
			w.wantPhase(other, connected)
		},
		"LiveKit is stopped gracefully, and everybody comes back": func(t *testing.T, w *world) {
			all := []member{w.connected(leaveOf(1), time.Hour), w.connected(leaveOf(2), time.Hour)}
			time.Sleep(10 * time.Minute)
			for _, m := range all {
				w.sfu.exit(m.Participant)
				w.hint(m, livekit.ParticipantLeft, livekit.ServerShutdown)
			}
			w.restartLiveKit(3 * time.Second)
			time.Sleep(silentPause)
			for _, m := range all {
				require.True(t, w.sfu.enter(m.Participant, livekit.Active))
			}
			time.Sleep(time.Minute)
			for _, m := range all {
				w.wantPhase(m, connected)
			}
		},
		"all rooms are made again as soon as one was answered for": func(t *testing.T, w *world) {
			var all []member
			for n := range 20 {
				m := leaveOf(n)
				m.Room = m.Identity
				all = append(all, w.connected(m, time.Hour))
				time.Sleep(700 * time.Millisecond) // so that each has a time of its own
			}
			w.restartLiveKit(5 * time.Minute)
			time.Sleep(3 * time.Second)
			for _, m := range all {
				require.True(t, w.sfu.enter(m.Participant, livekit.Active))
			}
		},
		"LiveKit is started anew during a look": func(t *testing.T, w *world) {
			m := w.connected(leaveOf(1), time.Hour)
			time.Sleep(time.Minute + time.Second)
			w.sfu.set(func(s *fakeSFU) { s.restarts = func() { clear(s.rooms) } })
			time.Sleep(lookInterval - shortestPause/2)
			w.wantPhase(m, silent) // nobody can tell which room the list is of
			time.Sleep(shortestPause)
			w.wantPhase(m, missing)
			time.Sleep(grace - shortestPause)
			w.wantPhase(m, missing)
		},
		"LiveKit is started anew between two looks": func(t *testing.T, w *world) {
			m := w.connected(leaveOf(1), time.Hour)
			time.Sleep(time.Minute + time.Second)
			w.sfu.exit(m.Participant)
			time.Sleep(lookInterval - time.Second + confirmed/2)
			w.wantPhase(m, missing)
			w.sfu.set(func(s *fakeSFU) { clear(s.rooms) })
			time.Sleep(grace - time.Second)
			w.wantPhase(m, missing)
			time.Sleep(time.Second)
			w.wantPhase(m, over)
		},
		"the homeserver dies before the row": func(t *testing.T, w *world) {
			m := leaveOf(1)
			w.timers.schedule(m.timer, alice, room, time.Hour)
			w.failing(errFault, "delegate")
			require.ErrorIs(t, w.delegate(m), errFault)
			w.wantPhase(m, over)
			w.restart(time.Second)
			w.failing(nil)
			require.NoError(t, w.delegate(m)) // the client repeats its request
			w.wantPhase(m, waiting)
		},
		"it dies after the row, and before the answer": func(t *testing.T, w *world) {
			m := leaveOf(1)
			w.timers.schedule(m.timer, alice, room, time.Hour)
			w.timers.set(func(f *fakeTimers) { f.written = true })
			w.failing(errFault, "delegate")
			require.ErrorIs(t, w.delegate(m), errFault)
			w.timers.set(func(f *fakeTimers) { f.written = false })
			w.failing(nil)
			w.restart(time.Second)
			w.wantPhase(m, waiting)
			require.NoError(t, w.delegate(m))
			w.wantPhase(m, waiting)
		},
		"it dies after the restart, and before the note": func(t *testing.T, w *world) {
			m := w.waiting(leaveOf(1), time.Hour)
			w.failing(errFault, "note")
			w.enters(m)
			w.wantRunning(m, 0)
			w.wantRow(m, expiration.DelegationWaiting)
			w.failing(nil)
			w.restart(time.Second)
			w.wantPhase(m, connected)
			w.wantRow(m, expiration.DelegationConnected)
		},
		"it dies before it has noted that somebody is gone": func(t *testing.T, w *world) {
			m := w.connected(leaveOf(1), time.Hour)
			time.Sleep(time.Minute)
			w.failing(errFault, "note")
			w.crashes(m)
			time.Sleep(time.Second)
			w.wantRow(m, expiration.DelegationConnected)
			w.failing(nil)
			w.restart(time.Second)
			time.Sleep(unheard)
			w.wantEnded(m, "finished", 0)
		},
		"it dies after it has ended the timer": func(t *testing.T, w *world) {
			m := w.connected(leaveOf(1), time.Hour)
			time.Sleep(time.Minute)
			w.timers.set(func(f *fakeTimers) { f.written = true })
			w.failing(errFault, "finish")
			w.crashes(m)
			time.Sleep(confirmed)
			w.wantEnded(m, "finished", 0)
			w.restart(0)
			w.failing(nil)
			w.wantPhase(m, over)
		},
		"it is dead for longer than the delay": func(t *testing.T, w *world) {
			m, other := w.connected(leaveOf(1), time.Minute), w.connected(leaveOf(2), time.Minute)
			w.kill()
			w.sfu.exit(other.Participant)
			time.Sleep(time.Hour)
			w.start()
			time.Sleep(time.Minute)
			w.wantPhase(m, connected)
			require.Equal(t, "finished", w.timers.of(other.timer).ended)
		},
		"a webhook is lost": func(t *testing.T, w *world) {
			m := w.waiting(leaveOf(1), time.Hour)
			w.sfu.enter(m.Participant, livekit.Active)
			time.Sleep(time.Second)
			w.wantPhase(m, connected)
			w.sfu.exit(m.Participant)
			time.Sleep(lookInterval + unheard)
			w.wantEnded(m, "finished", 0)
		},
		"LiveKit's restart takes a good part of a short duration": func(t *testing.T, w *world) {
			m := w.connected(tokenOf(1), minTokenDuration)
			w.restartLiveKit(3 * time.Second)
			time.Sleep(12 * time.Second)
			w.enters(m)
			w.wantPhase(m, connected)
			time.Sleep(time.Minute)
			require.Empty(t, w.timers.of(m.timer).ended)
		},
		"the database is away, but not for so long that a short duration runs out": func(t *testing.T, w *world) {
			m := w.connected(tokenOf(1), minTokenDuration)
			for range 10 {
				w.failing(errFault, "keep")
				time.Sleep(minTokenDuration/2 - 600*time.Millisecond)
				w.failing(nil)
				time.Sleep(minTokenDuration / 2)
			}
			require.Empty(t, w.timers.of(m.timer).ended)
		},
		"a client connects anew, and the webhook is lost": func(t *testing.T, w *world) {
			m := w.connected(leaveOf(1), time.Hour)
			for range 40 { // at every moment between two looks
				time.Sleep(lookInterval + 400*time.Millisecond)
				w.sfu.exit(m.Participant)
				time.Sleep(2 * time.Second)
				require.True(t, w.sfu.enter(m.Participant, livekit.Active))
			}
			time.Sleep(time.Minute)
			w.wantPhase(m, connected)
		},
		"nobody has a token for the room": func(t *testing.T, w *world) {
			w.timers.schedule(tokenOf(1).timer, alice, room, time.Hour)
			require.NoError(t, w.DelegateToken(t.Context(), tokenOf(1).timer.Hash, func(string, string) (livekit.Participant, error) {
				return tokenOf(1).Participant, nil
			}))
			time.Sleep(time.Minute)
			require.False(t, w.sfu.enter(tokenOf(1).Participant, livekit.Active), "LiveKit has no such room")
			w.getsToken(tokenOf(1).Participant)
			time.Sleep(waitingPause)
			w.enters(tokenOf(1))
			w.wantPhase(tokenOf(1), connected)
		},
		"webhooks are repeated, and many": func(t *testing.T, w *world) {
			m := w.connected(leaveOf(1), time.Hour)
			w.sfu.set(func(s *fakeSFU) { s.takes = time.Second })
			time.Sleep(time.Minute)
			before := w.asked()
			for range 1000 {
				w.Hint(livekit.Event{Kind: livekit.ParticipantLeft, Participant: m.Participant, Reason: "CONNECTION_TIMEOUT"})
				w.Hint(livekit.Event{Kind: livekit.RoomFinished, Participant: livekit.Participant{Room: m.Room}})
				w.Hint(livekit.Event{Kind: "track_published", Participant: m.Participant})
				w.Hint(livekit.Event{Kind: livekit.ParticipantLeft, Participant: livekit.Participant{Room: "another", Identity: "x"}})
			}
			time.Sleep(10 * time.Second)
			require.LessOrEqual(t, w.asked()-before, 2, "one is under way, and one comes after it")
			w.wantPhase(m, connected)
		},
		"a webhook of the first session comes after the second has begun": func(t *testing.T, w *world) {
			m := w.connected(leaveOf(1), time.Hour)
			w.sfu.exit(m.Participant)
			w.enters(m)
			w.hint(m, livekit.ParticipantLeft, "CONNECTION_TIMEOUT")
			time.Sleep(time.Hour)
			w.wantPhase(m, connected)
		},
		"a webhook comes during a look": func(t *testing.T, w *world) {
			m := w.connected(leaveOf(1), time.Hour)
			time.Sleep(time.Minute)
			w.sfu.set(func(s *fakeSFU) { s.takes = time.Second })
			w.hint(m, livekit.ParticipantLeft, "CONNECTION_TIMEOUT") // a look begins
			time.Sleep(time.Second / 2)
			w.crashes(m) // the list that is on its way still has the participant
			time.Sleep(time.Second/2 + 2*time.Second + confirmed)
			w.wantPhase(m, over)
		},
		"the leave cannot be handed over": func(t *testing.T, w *world) {
			require.ErrorIs(t, w.delegate(leaveOf(1)), expiration.ErrNotFound)
			w.timers.schedule(leaveOf(1).timer, "@bob:example.org", room, time.Hour)
			require.ErrorIs(t, w.delegate(leaveOf(1)), expiration.ErrNotFound)
			w.timers.schedule(leaveOf(2).timer, alice, "!another:example.org", time.Hour)
			require.ErrorIs(t, w.delegate(leaveOf(2)), expiration.ErrNotFound)
			w.timers.schedule(tokenOf(3).timer, alice, room, 10*time.Second-time.Millisecond)
			require.ErrorIs(t, w.delegate(tokenOf(3)), ErrTooShort)
			w.timers.schedule(tokenOf(5).timer, alice, room, time.Hour)
			require.ErrorIs(t, w.DelegateToken(t.Context(), tokenOf(5).timer.Hash, func(string, string) (livekit.Participant, error) {
				return tokenOf(5).Participant, errFault
			}), errFault)
			w.wantPhase(tokenOf(5), over)
			w.timers.schedule(leaveOf(4).timer, alice, room, time.Hour)
			w.failing(errFault, "find")
			require.ErrorIs(t, w.delegate(leaveOf(4)), errFault)
			w.failing(nil)
			w.kill()
			require.ErrorIs(t, w.delegate(leaveOf(4)), ErrStopped)
			w.start()
		},
		"the database is away": func(t *testing.T, w *world) {
			m := w.connected(leaveOf(1), time.Minute)
			w.failing(errFault, "find", "delegate", "note", "keep", "finish", "expire")
			time.Sleep(2 * time.Minute)
			w.wantPhase(m, connected)
			w.failing(nil)
			time.Sleep(time.Millisecond)
			require.Equal(t, "expired", w.timers.of(m.timer).ended, "the engine keeps its deadline")

			m = w.connected(leaveOf(2), 5*time.Minute)
			w.failing(errFault, "find", "delegate", "note", "keep", "finish", "expire")
			time.Sleep(4 * time.Minute)
			w.failing(nil)
			time.Sleep(time.Hour)
			w.wantPhase(m, connected)
		},
		"an expiring event is sent again with another duration": func(t *testing.T, w *world) {
			m := w.connected(tokenOf(1), time.Hour)
			w.timers.set(func(f *fakeTimers) { f.timers[m.timer].row.Duration = 10 * time.Minute })
			time.Sleep(checkInterval)
			w.wantRunning(m, 0)
			w.timers.set(func(f *fakeTimers) { f.timers[m.timer].row.Duration = time.Minute })
			require.NoError(t, w.delegate(m))
			w.wantRunning(m, 0)
			time.Sleep(time.Hour)
			w.wantPhase(m, connected)
		},
	} {
		t.Run(name, func(t *testing.T) { inWorld(t, test) })
	}
}

// A restart comes at most half a minute after a sign of life, however slowly LiveKit and the database answer.
func TestNoRestartLongAfterTheLastSignOfLife(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		m := w.connected(leaveOf(1), time.Hour)
		time.Sleep(10*time.Minute + time.Second)
		w.failing(errFault, "keep")
		w.silence(errFault)
		time.Sleep(fresh + time.Second)
		w.failing(nil)
		time.Sleep(30 * time.Minute)
		w.wantPhase(m, silent)
		require.Equal(t, 2, w.restarts(m))
	})
}

// Panics of LiveKit's client and of the engine are failures of one look and of one step.
func TestGoesOnAfterPanics(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		m := w.connected(leaveOf(1), time.Hour)
		time.Sleep(time.Minute)
		w.sfu.set(func(s *fakeSFU) { s.panics = true })
		time.Sleep(time.Minute)
		w.wantPhase(m, silent)
		w.sfu.set(func(s *fakeSFU) { s.panics = false })
		time.Sleep(silentPause)
		w.wantPhase(m, connected)

		w.timers.set(func(f *fakeTimers) {
			f.fail = func(operation string) error {
				if operation != "expire" {
					panic("on purpose: " + operation)
				}
				return nil
			}
		})
		w.crashes(m)
		time.Sleep(time.Minute)
		w.wantPhase(m, gone)
		w.failing(nil)
		time.Sleep(longestRetry)
		w.wantPhase(m, over)
		require.Equal(t, "finished", w.timers.of(m.timer).ended)
	})
	inWorld(t, func(t *testing.T, w *world) { // the panic is in the keeper itself
		m := w.connected(leaveOf(1), time.Hour)
		panics := 0
		bad := &task{do: func() { panics++; panic("on purpose") }}
		bad.next = func() (*queue, time.Time) { return &w.looks, time.Now() }
		w.mu.Lock()
		w.planWithMu(bad)
		w.mu.Unlock()
		time.Sleep(time.Hour)
		synctest.Wait()
		require.InDelta(t, time.Hour/panicPause, panics, 2)
		w.wantPhase(m, connected)
		w.mu.Lock()
		bad.next = func() (*queue, time.Time) { return nil, time.Time{} }
		w.mu.Unlock()
		time.Sleep(panicPause)
	})
}

// Looks, restarts and ends have bounded places each, and do not wait for one another.
func TestPlaces(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		w.sfu.set(func(s *fakeSFU) { s.takes = time.Second })
		var all []member
		for n := range 40 {
			m := leaveOf(n)
			m.Room = m.Identity
			w.sfu.roomWithMu(m.Room)
			w.sfu.enter(m.Participant, livekit.Active)
			all = append(all, w.waiting(m, time.Hour))
		}
		time.Sleep(20 * time.Second)
		synctest.Wait()
		require.Equal(t, lookPlaces, w.sfu.most)
		for _, m := range all {
			w.wantPhase(m, connected)
		}

		w.sfu.set(func(s *fakeSFU) { s.takes = 0 })
		w.timers.set(func(f *fakeTimers) { f.takes["finish"] = 30 * time.Second })
		time.Sleep(time.Minute)
		for _, m := range all[1:] { // all of one user
			w.crashes(m)
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		require.Equal(t, userPlaces, w.timers.mostEnds)
		bob := leaveOf(50)
		w.timers.schedule(bob.timer, "@bob:example.org", room, time.Hour)
		require.NoError(t, w.DelegateLeave(t.Context(), Leave{
			UserID: "@bob:example.org", RoomID: room, DelayID: "delay50", MemberKey: [32]byte{1}, Participant: bob.Participant,
		}))
		w.getsToken(bob.Participant)
		time.Sleep(waitingPause)
		w.enters(bob)
		time.Sleep(time.Minute)
		w.crashes(bob)
		time.Sleep(30*time.Second + 2*time.Second)
		require.Equal(t, "finished", w.timers.of(bob.timer).ended, "others do not wait for one user's")
		time.Sleep(time.Hour)
		w.wantPhase(all[0], connected)
	})
}

// Stop ends looks at once, waits for a step for five seconds at most, and may be called twice, or before Start.
func TestStop(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		m := w.connected(leaveOf(1), time.Hour)
		time.Sleep(time.Minute)
		w.timers.set(func(f *fakeTimers) { f.takes["finish"] = 3 * time.Second })
		w.crashes(m)
		time.Sleep(time.Second)
		w.sfu.set(func(s *fakeSFU) { s.hangs = true })
		w.waiting(leaveOf(2), time.Hour)
		began := time.Now()
		w.Stop()
		require.Less(t, time.Since(began), 3*time.Second)
		require.Equal(t, "finished", w.timers.of(m.timer).ended)
		w.Stop()
		w.sfu.set(func(s *fakeSFU) { s.hangs = false })

		w.start()
		m = w.connected(leaveOf(3), time.Hour)
		time.Sleep(time.Minute)
		w.timers.set(func(f *fakeTimers) { f.takes["finish"] = time.Minute })
		w.crashes(m)
		time.Sleep(time.Second)
		began = time.Now()
		w.Stop()
		require.Equal(t, stopPatience, time.Since(began))
		time.Sleep(time.Minute)
	})
	New(nil, nil, nil, nil).Stop()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.kill()
		k := New(w.sfu, w.timers, w.store, w.rooms)
		require.Error(t, k.Start(context.Background()), "the delegations cannot be loaded")
	})
}

// Two requests for one member at the same time: the newest row is the newest delegation in memory.
func TestConcurrentDelegations(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		w.timers.set(func(f *fakeTimers) { f.takes["delegate"] = time.Second })
		for n := range 10 {
			m := leaveOf(n)
			m.Identity = "the same"
			w.timers.schedule(m.timer, alice, room, time.Hour)
			go func() { _ = w.delegate(m) }()
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		require.Len(t, w.timers.rows, 1)
		require.Len(t, w.kept, 1)
		for nid := range w.timers.rows {
			require.Contains(t, w.kept, nid)
		}

		// What an older delegation of the same timer still writes comes before the row of the newer.
		w.timers.set(func(f *fakeTimers) { f.takes["note"], f.takes["delegate"] = 2*time.Second, 0 })
		m := w.waiting(tokenOf(1), time.Hour)
		require.True(t, w.sfu.enter(m.Participant, livekit.Active))
		w.hint(m, livekit.ParticipantJoined, "")
		time.Sleep(time.Second)
		m.Identity = "another"
		require.NoError(t, w.delegate(m))
		time.Sleep(time.Minute)
		w.wantRow(m, expiration.DelegationWaiting)

		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		unlock, err := w.users.Lock(t.Context(), alice)
		require.NoError(t, err)
		defer unlock()
		w.timers.schedule(leaveOf(20).timer, alice, room, time.Hour)
		err = w.DelegateLeave(ctx, Leave{UserID: alice, RoomID: room, DelayID: "delay20", MemberKey: [32]byte{7}})
		require.True(t, errors.Is(err, context.Canceled))

		for range waitingOfUser {
			go func() { _ = w.delegate(leaveOf(20)) }()
		}
		synctest.Wait()
		require.ErrorIs(t, w.delegate(leaveOf(20)), ErrCrowded)
	})
}
