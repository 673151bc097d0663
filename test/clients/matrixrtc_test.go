//go:build all

package clients

import (
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
)

const (
	// delay is that of the leave event, which the server sends unless the participant restarts it: the SDK's default.
	delay = 8 * time.Second
	// restart is how often the participant restarts it.
	restart = 2 * time.Second
	// promptly is how long it may take from when the server is to send a leave event until the other participant sees it.
	promptly = 2 * time.Second
)

// call is a call with two participants.
type call struct {
	server     *homeserver.Server
	alice, bob *participant
	delay      time.Duration
}

// begin makes a room with a call in it, on a server of its own.
func begin(t *testing.T, delay time.Duration) call {
	t.Helper()
	t.Parallel() // most of the time is waiting
	withSDK(t)
	server := start(t)
	alice, err := server.Register(t.Context(), "alice")
	require.NoError(t, err)
	bob, err := server.Register(t.Context(), "bob")
	require.NoError(t, err)
	roomID, err := alice.CreateRoom(t.Context(), homeserver.JSON{"power_level_content_override": homeserver.JSON{
		"events": homeserver.JSON{"org.matrix.msc3401.call.member": 0},
	}})
	require.NoError(t, err)
	require.NoError(t, bob.Join(t.Context(), roomID))
	config := homeserver.JSON{
		"delayedLeaveEventDelayMs": delay.Milliseconds(), "delayedLeaveEventRestartMs": restart.Milliseconds(),
		"networkErrorRetryMs": time.Second.Milliseconds(),
	}
	c := call{server: server, delay: delay}
	c.alice = join(t, alice, roomID, config)
	// The SDK joins once more if it hears of somebody else's membership before its own.
	c.alice.sees(t, alice.UserID)
	// It schedules its leave, joins, and asks with a restart whether the join has cancelled the leave.
	for _, request := range []string{"schedule", "restart"} {
		answered := c.alice.await(t, c.alice.requests, request, func(line) bool { return true })
		require.Equal(t, line{Request: request, Status: 200, at: answered.at}, answered)
	}
	c.bob = join(t, bob, roomID, config)
	for _, p := range []*participant{c.alice, c.bob} {
		p.sees(t, alice.UserID, bob.UserID)
	}
	return c
}

// aliceVanishes requires that nobody has come or gone since bob was last asked, ends alice's process with a signal, and
// requires that bob sees her leave when her delay has passed.
func (c call) aliceVanishes(t *testing.T, signal syscall.Signal) {
	t.Helper()
	c.alice.manages(t, "restart", time.Now())
	gone := c.alice.signal(t, signal)
	seen := c.bob.change(t)
	require.Equal(t, []string{c.bob.user}, seen.Members)
	require.WithinRange(t, seen.at, gone.Add(c.delay-restart), gone.Add(c.delay+promptly))
}

// A participant that crashes leaves the call when its delay has passed, and does not while it lives.
func TestParticipantCrashes(t *testing.T) {
	c := begin(t, delay)
	for joined := time.Now(); time.Since(joined) < delay; {
		c.alice.manages(t, "restart", time.Now())
	}
	c.aliceVanishes(t, syscall.SIGKILL)
}

// A participant that leaves has the server send its leave event at once.
func TestParticipantLeaves(t *testing.T) {
	c := begin(t, delay)
	left := c.alice.tell(t, "leave")
	c.alice.manages(t, "send", left)
	seen := c.bob.change(t)
	require.Equal(t, []string{c.bob.user}, seen.Members)
	require.WithinRange(t, seen.at, left, left.Add(promptly))
}

// A participant that hangs for longer than its delay has left the call. When it goes on it comes back, with a delayed
// event as before.
func TestParticipantHangs(t *testing.T) {
	c := begin(t, delay)
	c.aliceVanishes(t, syscall.SIGSTOP)
	c.alice.signal(t, syscall.SIGCONT)
	c.bob.sees(t, c.alice.user, c.bob.user)
	c.aliceVanishes(t, syscall.SIGKILL)
}

// The server crashes and starts again, and the call goes on as if nothing had happened.
func TestServerCrashes(t *testing.T) {
	c := begin(t, 2*delay) // the server needs some time for its start
	c.alice.manages(t, "restart", time.Now())
	crash := time.Now()
	c.server.Kill()
	require.NoError(t, c.server.Start(t.Context()))
	for _, p := range []*participant{c.alice, c.bob} {
		answered := p.await(t, p.requests, "an answer", func(l line) bool { return l.Status < 500 && l.at.After(crash) })
		require.Equal(t, "restart", answered.Request)
		require.Equal(t, 200, answered.Status)
		p.await(t, p.syncs, "a sync", func(l line) bool { return l.Sync == "SYNCING" && l.at.After(crash) })
	}
	c.aliceVanishes(t, syscall.SIGKILL)
}
