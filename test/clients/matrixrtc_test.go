//go:build all

package clients

import (
	"cmp"
	"net/http"
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
	// memberType is the type of a participant's membership.
	memberType = "org.matrix.msc3401.call.member"
)

// call is a call with two participants.
type call struct {
	server     *homeserver.Server
	roomID     string
	alice, bob *participant
	// asAlice and asBob make the users' requests outside of the call.
	asAlice, asBob *homeserver.Client
	// scheduled is alice's first delayed event, and delay is what its delay turned out to be.
	scheduled line
	delay     time.Duration
}

// setting is how a call begins. The zero value stands for what is usual.
type setting struct {
	server homeserver.Config
	// delay is the delay of the leave event that the participants ask for.
	delay time.Duration
	// restart is how often alice restarts her leave event.
	restart time.Duration
	// retry is how long a participant waits after a network error. It tries ten times.
	retry time.Duration
	// through returns the URL at which alice finds the server.
	through func(server string) string
	// before is called before alice joins, and joined before bob does.
	before, joined func(call)
	// joins are the requests with which alice joins, see participant.does.
	joins []string
}

// begin makes a room with a call in it, on a server of its own.
func begin(t *testing.T, s setting) call {
	t.Helper()
	t.Parallel()
	withSDK(t)
	server := start(t, s.server)
	c := call{server: server, asAlice: register(t, server, "alice"), asBob: register(t, server, "bob")}
	var err error
	c.roomID, err = c.asAlice.CreateRoom(t.Context(), homeserver.JSON{"power_level_content_override": homeserver.JSON{
		"events": homeserver.JSON{memberType: 0},
	}})
	require.NoError(t, err)
	require.NoError(t, c.asBob.Join(t.Context(), c.roomID))
	if s.before != nil {
		s.before(c)
	}
	config := homeserver.JSON{
		"delayedLeaveEventDelayMs":   cmp.Or(s.delay, delay).Milliseconds(),
		"delayedLeaveEventRestartMs": cmp.Or(s.restart, restart).Milliseconds(),
		"networkErrorRetryMs":        cmp.Or(s.retry, time.Second).Milliseconds(),
	}
	alice := *c.asAlice
	if s.through != nil {
		alice.URL = s.through(server.URL)
	}
	c.alice = join(t, &alice, c.roomID, config)
	joins := s.joins
	if joins == nil {
		joins = usualJoin
	}
	for _, answer := range c.alice.does(t, joins...) {
		if answer.DelayID != "" && c.scheduled.DelayID == "" {
			c.scheduled, c.delay = answer, time.Duration(answer.Delay)*time.Millisecond
		}
	}
	// The SDK joins once more if it sees another user's membership before its own.
	c.alice.sees(t, c.asAlice.UserID)
	if s.joined != nil {
		s.joined(c)
	}
	config["delayedLeaveEventRestartMs"] = restart.Milliseconds()
	c.bob = join(t, c.asBob, c.roomID, config)
	for _, p := range []*participant{c.alice, c.bob} {
		p.sees(t, c.asAlice.UserID, c.asBob.UserID)
	}
	return c
}

// usualJoin is how a participant joins: it schedules its leave event, and sends its membership. Then it restarts the leave event, to learn
// whether the membership has cancelled it.
var usualJoin = []string{"schedule 200", "join 200", "restart 200"}

// aliceStays requires that alice is in the call for as long as her delay, and that she restarts her leave event meanwhile.
func (c call) aliceStays(t *testing.T) {
	t.Helper()
	for joined := time.Now(); time.Since(joined) < c.delay; {
		c.alice.manages(t, "restart", time.Now())
	}
	c.unchanged(t)
}

// unchanged requires that bob has seen both participants in the call all the time since he was last asked.
func (c call) unchanged(t *testing.T) {
	t.Helper()
	for len(c.bob.members) > 0 {
		require.Equal(t, []string{c.alice.user, c.bob.user}, (<-c.bob.members).Members)
	}
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
	c := begin(t, setting{})
	c.aliceStays(t)
	c.aliceVanishes(t, syscall.SIGKILL)
}

// A participant that leaves the call makes the server send its leave event at once.
func TestParticipantLeaves(t *testing.T) {
	c := begin(t, setting{})
	left := c.alice.tell(t, "leave")
	c.alice.manages(t, "send", left)
	seen := c.bob.change(t)
	require.Equal(t, []string{c.bob.user}, seen.Members)
	require.WithinRange(t, seen.at, left, left.Add(promptly))
}

// A participant that hangs for longer than its delay leaves the call. When it continues, it joins again and schedules a new leave event.
func TestParticipantHangs(t *testing.T) {
	c := begin(t, setting{})
	c.aliceVanishes(t, syscall.SIGSTOP)
	c.alice.signal(t, syscall.SIGCONT)
	c.bob.sees(t, c.alice.user, c.bob.user)
	c.aliceVanishes(t, syscall.SIGKILL)
}

// The server crashes and starts again. The call continues as if nothing had happened.
func TestServerCrashes(t *testing.T) {
	c := begin(t, setting{delay: 2 * delay}) // the server needs some time to start
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

// The server is down until both participants' leave events are due, and sends them when it starts. Both participants join again.
func TestServerIsDown(t *testing.T) {
	c := begin(t, setting{retry: 3 * time.Second})
	c.alice.manages(t, "restart", time.Now())
	require.NoError(t, c.server.Stop())
	time.Sleep(c.delay)
	up := time.Now()
	require.NoError(t, c.server.Start(t.Context()))
	for _, p := range []*participant{c.alice, c.bob} {
		for _, request := range []string{"schedule", "join", "restart"} {
			p.manages(t, request, up)
		}
	}
	c.bob.await(t, c.bob.members, "a leave", func(l line) bool { return len(l.Members) < 2 })
	c.bob.sees(t, c.alice.user, c.bob.user)
	c.aliceStays(t)
	c.aliceVanishes(t, syscall.SIGKILL)
}

// The leave events of both participants are lost. Alice's client notices it at the next restart, and schedules another one without leaving
// the call. Bob's notices it when he leaves, and sends the leave event itself.
func TestDelayedEventIsLost(t *testing.T) {
	c := begin(t, setting{})
	lose := func(user *homeserver.Client) {
		for delayID := range scheduled(t, user) {
			do(t, user, http.MethodPost, unstableEvents+"/"+delayID+"/cancel", nil)
		}
	}
	c.alice.manages(t, "restart", time.Now())
	lose(c.asAlice)
	c.alice.does(t, "restart 404", "schedule 200", "restart 200")
	c.aliceStays(t)

	c.bob.manages(t, "restart", time.Now())
	lose(c.asBob)
	left := c.bob.tell(t, "leave")
	c.bob.does(t, "send 404", "leave 200")
	require.WithinRange(t, c.alice.change(t).at, left, left.Add(promptly))
}
