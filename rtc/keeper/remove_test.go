package keeper

import (
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/rtc/livekit"
)

// remembered returns a member with a token, which connects.
func (w *world) remembered(n int) expiration.Member {
	w.t.Helper()
	p := leaveOf(n).Participant
	m := expiration.Member{Room: p.Room, Identity: p.Identity, RoomID: room, UserID: fmt.Sprintf("@user%d:example.org", n)}
	require.NoError(w.t, w.Remember(w.t.Context(), m))
	w.connects(m)
	return m
}

func participantOf(m expiration.Member) livekit.Participant {
	return livekit.Participant{Room: m.Room, Identity: m.Identity}
}

func (w *world) connects(m expiration.Member) {
	w.t.Helper()
	w.sfu.set(func(s *fakeSFU) { s.roomWithMu(m.Room) })
	require.True(w.t, w.sfu.enter(participantOf(m), livekit.Active))
}

// leaves has a user leave the room, and the stream report it.
func (w *world) leaves(m expiration.Member) {
	w.t.Helper()
	w.rooms.set(m.RoomID, m.UserID, false)
	require.NoError(w.t, w.MemberLeft(w.t.Context(), m.RoomID, m.UserID))
	synctest.Wait()
}

// joinedHint is the webhook of a participant that has connected.
func (w *world) joinedHint(m expiration.Member) {
	w.Hint(livekit.Event{Kind: livekit.ParticipantJoined, Participant: participantOf(m)})
	synctest.Wait()
}

func TestRemoving(t *testing.T) {
	for name, test := range map[string]func(t *testing.T, w *world){
		"whoever leaves the room is removed, and nobody else": func(t *testing.T, w *world) {
			m, other := w.remembered(1), w.remembered(2)
			w.leaves(m)
			require.False(t, w.sfu.has(participantOf(m)))
			require.True(t, w.sfu.has(participantOf(other)))
			w.store.mu.Lock()
			w.store.before = func(operation string) { require.NotEqual(t, "mark", operation, "nothing is written for most users") }
			w.store.mu.Unlock()
			w.leaves(expiration.Member{RoomID: room, UserID: "@nobody:example.org"})
		},
		"all names of a user": func(t *testing.T, w *world) {
			m := w.remembered(1)
			second := m
			second.Room, second.Identity = "another slot", "another"
			require.NoError(t, w.Remember(t.Context(), second))
			w.connects(second)
			elsewhere := m
			elsewhere.RoomID, elsewhere.Room = "!elsewhere:example.org", "elsewhere"
			require.NoError(t, w.Remember(t.Context(), elsewhere))
			w.connects(elsewhere)
			w.leaves(m)
			require.False(t, w.sfu.has(participantOf(second)))
			require.True(t, w.sfu.has(participantOf(elsewhere)))
		},
		"LiveKit is away": func(t *testing.T, w *world) {
			m := w.remembered(1)
			w.silence(errFault)
			w.leaves(m)
			time.Sleep(time.Hour)
			w.silence(nil)
			time.Sleep(longestRetry)
			synctest.Wait()
			require.False(t, w.sfu.has(participantOf(m)))
		},
		"the homeserver dies meanwhile": func(t *testing.T, w *world) {
			m := w.remembered(1)
			w.silence(errFault)
			w.leaves(m)
			w.kill()
			w.silence(nil)
			w.start()
			synctest.Wait()
			require.False(t, w.sfu.has(participantOf(m)))
		},
		"whoever connects again with an old token is removed again": func(t *testing.T, w *world) {
			m := w.remembered(1)
			w.leaves(m)
			w.connects(m)
			w.joinedHint(m)
			require.False(t, w.sfu.has(participantOf(m)))
			time.Sleep(time.Minute)
			w.connects(m) // and the webhook is lost
			time.Sleep(removeInterval)
			synctest.Wait()
			require.False(t, w.sfu.has(participantOf(m)))
			w.connects(m) // also if the homeserver was restarted
			w.restart(time.Second)
			synctest.Wait()
			require.False(t, w.sfu.has(participantOf(m)))
			time.Sleep(tokenLife + 2*removeInterval)
			w.connects(m) // with a token that LiveKit gave at a connection that nobody noticed
			w.joinedHint(m)
			require.False(t, w.sfu.has(participantOf(m)))
			time.Sleep(rememberedFor + 2*removeInterval)
			synctest.Wait()
			require.Empty(t, w.store.members, "in the end nobody is remembered")
		},
		"whoever keeps connecting for a moment is remembered for longer": func(t *testing.T, w *world) {
			m := w.remembered(1)
			w.leaves(m)
			for began := time.Now(); time.Since(began) < 2*rememberedFor; {
				time.Sleep(6 * time.Hour)
				w.Hint(livekit.Event{Kind: livekit.ParticipantAborted, Participant: participantOf(m)})
			}
			w.connects(m)
			w.joinedHint(m)
			require.False(t, w.sfu.has(participantOf(m)))
		},
		"one with too many names does not block the others": func(t *testing.T, w *world) {
			w.store.mu.Lock()
			for n := range maxIdentities + 5 { // two requests at once may make one more
				m := expiration.Member{Room: "call", Identity: fmt.Sprint(n), RoomID: room, UserID: alice, Made: w.wall(), Leaving: true}
				w.store.members[participantOf(m)] = m
			}
			w.store.mu.Unlock()
			w.joinedHint(expiration.Member{})
			m := w.remembered(1)
			w.leaves(m)
			time.Sleep(time.Minute)
			require.False(t, w.sfu.has(participantOf(m)))
			w.store.mu.Lock()
			defer w.store.mu.Unlock()
			for _, m := range w.store.members {
				require.Equal(t, m.UserID != alice, m.Leaving, "alice is joined")
			}
		},
		"whoever is not joined any more is removed, although nothing was reported": func(t *testing.T, w *world) {
			m := w.remembered(1)
			w.rooms.set(m.RoomID, m.UserID, false)
			w.joinedHint(m)
			require.False(t, w.sfu.has(participantOf(m)))
		},
		"a look finds them too": func(t *testing.T, w *world) {
			w.connected(leaveOf(9), time.Hour)
			m := w.remembered(1)
			w.rooms.set(m.RoomID, m.UserID, false)
			time.Sleep(lookInterval)
			synctest.Wait()
			require.False(t, w.sfu.has(participantOf(m)))
			require.Len(t, w.sfu.removed, 1)
		},
		"a membership that cannot be looked at is looked at later": func(t *testing.T, w *world) {
			m := w.remembered(1)
			w.rooms.set(m.RoomID, m.UserID, false)
			fault := func(err error) {
				w.rooms.mu.Lock()
				defer w.rooms.mu.Unlock()
				w.rooms.fault = err
			}
			fault(errFault)
			w.joinedHint(m)
			time.Sleep(10 * time.Minute)
			synctest.Wait()
			require.True(t, w.sfu.has(participantOf(m)))
			fault(nil)
			time.Sleep(longestRetry)
			synctest.Wait()
			require.False(t, w.sfu.has(participantOf(m)))
		},
		"participants of others are left alone": func(t *testing.T, w *world) {
			stranger := expiration.Member{Room: "call", Identity: "recorder"}
			w.connects(stranger)
			w.joinedHint(stranger)
			time.Sleep(time.Hour)
			synctest.Wait()
			require.True(t, w.sfu.has(participantOf(stranger)))
		},
		"whoever joins the room again is not removed": func(t *testing.T, w *world) {
			m := w.remembered(1)
			w.silence(errFault)
			w.leaves(m)
			w.rooms.set(m.RoomID, m.UserID, true)
			w.silence(nil)
			time.Sleep(time.Hour)
			synctest.Wait()
			require.True(t, w.sfu.has(participantOf(m)))
			require.False(t, w.store.members[participantOf(m)].Leaving)
		},
		"whoever joins the room again, and is kicked again": func(t *testing.T, w *world) {
			m := w.remembered(1)
			w.leaves(m)
			w.rooms.set(m.RoomID, m.UserID, true)
			w.connects(m) // with the old token
			w.joinedHint(m)
			require.True(t, w.sfu.has(participantOf(m)))
			time.Sleep(time.Second)
			w.leaves(m)
			require.False(t, w.sfu.has(participantOf(m)))
		},
		"many whose membership cannot be looked at": func(t *testing.T, w *world) {
			w.rooms.mu.Lock()
			w.rooms.out[[2]string{room, alice}], w.rooms.fault = true, errFault
			w.rooms.mu.Unlock()
			for n := range 100 {
				m := expiration.Member{Room: "call", Identity: fmt.Sprint(n), RoomID: room, UserID: alice, Made: w.wall()}
				w.store.mu.Lock()
				w.store.members[participantOf(m)] = m
				w.store.mu.Unlock()
				w.connects(m)
				w.joinedHint(m)
			}
			time.Sleep(time.Minute)
			w.rooms.mu.Lock()
			w.rooms.fault = nil
			w.rooms.mu.Unlock()
			time.Sleep(longestRetry)
			synctest.Wait()
			require.Len(t, w.sfu.removed, 100)
		},
		"a user who is not joined gets no token": func(t *testing.T, w *world) {
			m := expiration.Member{Room: "call", Identity: "x", RoomID: room, UserID: alice}
			w.rooms.set(room, alice, false)
			require.ErrorIs(t, w.Remember(t.Context(), m), ErrNotJoined)
			require.Empty(t, w.store.members)
		},
		"a kick while a token is made is not lost": func(t *testing.T, w *world) {
			m := w.remembered(1)
			var once sync.Once
			w.store.mu.Lock()
			w.store.before = func(operation string) {
				if operation == "remember" {
					once.Do(func() {
						w.leaves(m)
						w.connects(m)
					})
				}
			}
			w.store.mu.Unlock()
			require.ErrorIs(t, w.Remember(t.Context(), m), ErrNotJoined)
			synctest.Wait()
			require.False(t, w.sfu.has(participantOf(m)))
			require.True(t, w.store.members[participantOf(m)].Leaving)
		},
		"a user has a bounded number of names": func(t *testing.T, w *world) {
			m := expiration.Member{Room: "call", RoomID: room, UserID: alice}
			for n := range maxIdentities {
				m.Identity = fmt.Sprint(n)
				require.NoError(t, w.Remember(t.Context(), m))
			}
			require.NoError(t, w.Remember(t.Context(), m), "it is one of them")
			m.Identity = "one more"
			require.ErrorIs(t, w.Remember(t.Context(), m), ErrTooMany)
		},
		"whoever stays connected is remembered, and others are forgotten": func(t *testing.T, w *world) {
			for n := range 2 {
				w.remembered(n)
			}
			w.sfu.exit(leaveOf(1).Participant)
			w.connected(leaveOf(9), time.Hour)
			time.Sleep(rememberedFor + 2*pruneInterval)
			synctest.Wait()
			require.Len(t, w.store.members, 2)
			require.Contains(t, w.store.members, leaveOf(0).Participant)
			require.Contains(t, w.store.members, leaveOf(9).Participant)
		},
		"one that LiveKit cannot remove does not block the others": func(t *testing.T, w *world) {
			bad := w.remembered(1)
			w.sfu.set(func(s *fakeSFU) {
				s.onRemove = func(p livekit.Participant) error {
					if p == participantOf(bad) {
						return errFault
					}
					return nil
				}
			})
			w.leaves(bad)
			time.Sleep(10 * time.Minute)
			for n := range 30 {
				m := w.remembered(10 + n)
				w.leaves(m)
				require.False(t, w.sfu.has(participantOf(m)))
			}
			require.True(t, w.sfu.has(participantOf(bad)))
			w.sfu.set(func(s *fakeSFU) { s.onRemove = nil })
			time.Sleep(longestRetry)
			synctest.Wait()
			require.False(t, w.sfu.has(participantOf(bad)))
		},
		"many at once": func(t *testing.T, w *world) {
			var all []expiration.Member
			for n := range 3 * maxRemovals {
				all = append(all, w.remembered(n))
			}
			w.silence(errFault)
			for _, m := range all {
				w.leaves(m)
			}
			w.silence(nil)
			time.Sleep(longestRetry)
			synctest.Wait()
			require.Len(t, w.sfu.removed, len(all))
			time.Sleep(rememberedFor + 2*removeInterval)
			synctest.Wait()
			require.Empty(t, w.store.members)
		},
		"the store is away, or panics": func(t *testing.T, w *world) {
			m := w.remembered(1)
			w.store.mu.Lock()
			w.store.fault = errFault
			w.store.mu.Unlock()
			require.ErrorIs(t, w.MemberLeft(t.Context(), m.RoomID, m.UserID), errFault)
			require.ErrorIs(t, w.Remember(t.Context(), m), errFault)
			w.rooms.set(m.RoomID, m.UserID, false)
			w.joinedHint(m)
			w.store.mu.Lock()
			w.store.fault, w.store.before = nil, func(string) { panic("on purpose") }
			w.store.mu.Unlock()
			time.Sleep(time.Minute)
			w.store.mu.Lock()
			w.store.before = nil
			w.store.mu.Unlock()
			time.Sleep(longestRetry)
			synctest.Wait()
			require.False(t, w.sfu.has(participantOf(m)))
		},
	} {
		t.Run(name, func(t *testing.T) { inWorld(t, test) })
	}
}

// A flood of webhooks takes bounded memory.
func TestJoinedIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := New(newFakeSFU(), newFakeTimers(), newFakeStore(), &fakeRooms{})
		for n := range maxJoined + 10 {
			k.Hint(livekit.Event{Kind: livekit.ParticipantJoined, Participant: livekit.Participant{Room: "call", Identity: fmt.Sprint(n)}})
		}
		require.Len(t, k.joined, maxJoined)
	})
}
