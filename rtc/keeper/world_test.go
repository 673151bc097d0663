package keeper

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sirupsen/logrus"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/rtc/livekit"
)

func TestMain(m *testing.M) {
	logrus.SetLevel(logrus.PanicLevel) // the tests cause faults on purpose
	goleak.VerifyTestMain(m)           // Stop ends all goroutines
}

const (
	alice = "@alice:example.org"
	room  = "!room:example.org"
)

// world is a keeper with fakes around it, under fake time.
type world struct {
	*Keeper
	t      *testing.T
	sfu    *fakeSFU
	timers *fakeTimers
	store  *fakeStore
	rooms  *fakeRooms
	step   time.Duration // how far the wall clock is off in processes that start from now on
}

func newWorld(t *testing.T) *world {
	w := &world{t: t, sfu: newFakeSFU(), timers: newFakeTimers(), store: newFakeStore(), rooms: &fakeRooms{out: map[[2]string]bool{}}}
	w.start()
	return w
}

// inWorld runs a test under fake time.
func inWorld(t *testing.T, test func(t *testing.T, w *world)) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer func() { w.Stop() }()
		test(t, w)
		synctest.Wait()
		require.NoError(t, w.invariants())
		require.Empty(t, w.timers.problems)
	})
}

func (w *world) start() {
	w.timers.start()
	w.Keeper = New(w.sfu, w.timers, w.store, w.rooms)
	step := w.step
	w.wall = func() time.Time { return time.Now().Round(0).Add(step) }
	require.NoError(w.t, w.Start(w.t.Context()))
}

// kill ends the process. What it does after that has no effect.
func (w *world) kill() {
	w.timers.stop()
	w.Stop()
}

// restart kills the process, and starts the next one after a time.
func (w *world) restart(down time.Duration) {
	w.kill()
	time.Sleep(down)
	w.start()
}

// member is a participant with its timer.
type member struct {
	livekit.Participant
	timer expiration.Kept
}

func leaveOf(n int) member {
	return member{
		Participant: livekit.Participant{Room: "call", Identity: fmt.Sprintf("identity%d", n)},
		timer:       expiration.Kept{Hash: expiration.HashToken(fmt.Sprintf("delay%d", n)), Delayed: true},
	}
}

func tokenOf(n int) member {
	m := leaveOf(n)
	m.timer = expiration.Kept{Hash: expiration.HashToken(fmt.Sprintf("token%d", n))}
	return m
}

// getsToken notes that a token was made for a participant, as Remember does.
func (w *world) getsToken(p livekit.Participant) {
	w.store.mu.Lock()
	defer w.store.mu.Unlock()
	if _, ok := w.store.members[p]; !ok {
		w.store.members[p] = expiration.Member{Room: p.Room, Identity: p.Identity, RoomID: room, UserID: alice, Made: w.wall()}
	}
}

// delegate hands over the timer of a member, for whom a token was made.
func (w *world) delegate(m member) error {
	w.getsToken(m.Participant)
	if !m.timer.Delayed {
		return w.DelegateToken(w.t.Context(), m.timer.Hash, func(userID, roomID string) (livekit.Participant, error) {
			require.Equal(w.t, []string{alice, room}, []string{userID, roomID})
			return m.Participant, nil
		})
	}
	for n := range 100 { // which delay ID has this hash
		if delayID := fmt.Sprintf("delay%d", n); expiration.HashToken(delayID) == m.timer.Hash {
			return w.DelegateLeave(w.t.Context(), Leave{
				UserID: alice, RoomID: room, DelayID: delayID, MemberKey: sha256.Sum256([]byte(m.Identity)), Participant: m.Participant,
			})
		}
	}
	return errors.New("no such delay ID")
}

// waiting returns a member whose timer was just handed over, and who is not connected yet.
func (w *world) waiting(m member, delay time.Duration) member {
	w.t.Helper()
	w.timers.schedule(m.timer, alice, room, delay)
	require.NoError(w.t, w.delegate(m))
	synctest.Wait()
	return m
}

// connected returns a member who is connected, as the keeper knows.
func (w *world) connected(m member, delay time.Duration) member {
	w.t.Helper()
	w.waiting(m, delay)
	w.enters(m)
	w.wantPhase(m, connected)
	return m
}

// enters connects a member, and its webhook comes.
func (w *world) enters(m member) {
	w.t.Helper()
	require.True(w.t, w.sfu.enter(m.Participant, livekit.Active))
	w.hint(m, livekit.ParticipantJoined, "")
}

// crashes disconnects a member, as LiveKit does 20 seconds after a crash, and its webhook comes.
func (w *world) crashes(m member) {
	w.sfu.exit(m.Participant)
	w.hint(m, livekit.ParticipantLeft, "CONNECTION_TIMEOUT")
}

func (w *world) hint(m member, kind livekit.Kind, reason livekit.Reason) {
	w.Hint(livekit.Event{Kind: kind, Participant: m.Participant, Reason: reason})
	synctest.Wait()
}

// restartLiveKit ends LiveKit, and starts it again after a time.
func (w *world) restartLiveKit(down time.Duration) {
	w.silence(errFault)
	w.sfu.set(func(s *fakeSFU) { clear(s.rooms) })
	time.Sleep(down)
	w.silence(nil)
}

// silence has LiveKit answer with an error from now on.
func (w *world) silence(err error) { w.sfu.set(func(s *fakeSFU) { s.fault = err }) }

// failing has some operations of the engine fail from now on.
func (w *world) failing(err error, operations ...string) {
	w.timers.set(func(f *fakeTimers) {
		f.fail = func(operation string) error {
			for _, o := range operations {
				if o == operation {
					return err
				}
			}
			return nil
		}
	})
}

// asked returns for how many lists of participants LiveKit was asked.
func (w *world) asked() int {
	synctest.Wait()
	w.sfu.mu.Lock()
	defer w.sfu.mu.Unlock()
	return w.sfu.asked
}

// phaseOf returns the phase of a member's delegation, or over.
func (w *world) phaseOf(m member) phase {
	synctest.Wait()
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, d := range w.kept {
		if d.row.Kept == m.timer {
			return d.phase
		}
	}
	return over
}

func (w *world) wantPhase(m member, p phase) {
	w.t.Helper()
	require.Equal(w.t, p.String(), w.phaseOf(m).String())
	require.NoError(w.t, w.invariants())
}

// wantRow requires what the row says, or that there is none, for "".
func (w *world) wantRow(m member, p expiration.DelegationPhase) {
	w.t.Helper()
	synctest.Wait()
	row, _ := w.timers.rowOf(m.timer)
	require.Equal(w.t, p, row.Phase)
}

// wantRunning requires that the timer runs, and was restarted last so long ago.
func (w *world) wantRunning(m member, restarted time.Duration) {
	w.t.Helper()
	synctest.Wait()
	tm := w.timers.of(m.timer)
	require.Empty(w.t, tm.ended)
	require.NotEmpty(w.t, tm.restarts)
	require.Equal(w.t, restarted, time.Since(tm.restarts[len(tm.restarts)-1]))
}

// wantEnded requires that the timer has ended in some way, so long ago.
func (w *world) wantEnded(m member, how string, ago time.Duration) {
	w.t.Helper()
	synctest.Wait()
	tm := w.timers.of(m.timer)
	require.Equal(w.t, how, tm.ended)
	require.Equal(w.t, ago, time.Since(tm.endedAt))
}

// restarts returns how often the timer was restarted.
func (w *world) restarts(m member) int {
	synctest.Wait()
	return len(w.timers.of(m.timer).restarts)
}
