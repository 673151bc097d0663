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
	// delay is the delay of the leave event. The server sends the event unless the participant restarts it. This is the SDK's default.
	delay = 8 * time.Second
	// restart is how often the participant restarts its leave event.
	restart = 2 * time.Second
	// promptly limits the time from when a leave event is due until the other participant sees it.
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
	t.Parallel() // the test mostly waits
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
	// The SDK joins once more if it sees another user's membership before its own.
	c.alice.sees(t, alice.UserID)
	// The SDK schedules its leave event and joins. Then it restarts the leave event, to learn whether the join has cancelled it.
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

// aliceVanishes requires that the members have not changed since bob's last report, and ends alice's process with a signal. Then it
// requires that bob sees her leave when her delay has passed.
func (c call) aliceVanishes(t *testing.T, signal syscall.Signal) {
	t.Helper()
	c.alice.manages(t, "restart", time.Now())
	gone := c.alice.signal(t, signal)
	seen := c.bob.change(t)
	require.Equal(t, []string{c.bob.user}, seen.Members)
	require.WithinRange(t, seen.at, gone.Add(c.delay-restart), gone.Add(c.delay+promptly))
}

// A participant that crashes leaves the call when its delay has passed. A running participant stays.
func TestParticipantCrashes(t *testing.T) {
	c := begin(t, delay)
	for joined := time.Now(); time.Since(joined) < delay; {
		c.alice.manages(t, "restart", time.Now())
	}
	c.aliceVanishes(t, syscall.SIGKILL)
}

// A participant that leaves the call makes the server send its leave event at once.
func TestParticipantLeaves(t *testing.T) {
	c := begin(t, delay)
	left := c.alice.tell(t, "leave")
	c.alice.manages(t, "send", left)
	seen := c.bob.change(t)
	require.Equal(t, []string{c.bob.user}, seen.Members)
	require.WithinRange(t, seen.at, left, left.Add(promptly))
}

// A participant that hangs for longer than its delay leaves the call. When it continues, it joins again and schedules a new leave event.
func TestParticipantHangs(t *testing.T) {
	c := begin(t, delay)
	c.aliceVanishes(t, syscall.SIGSTOP)
	c.alice.signal(t, syscall.SIGCONT)
	c.bob.sees(t, c.alice.user, c.bob.user)
	c.aliceVanishes(t, syscall.SIGKILL)
}

// The server crashes and starts again. The call continues as if nothing had happened.
func TestServerCrashes(t *testing.T) {
	c := begin(t, 2*delay) // the server needs some time to start
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
