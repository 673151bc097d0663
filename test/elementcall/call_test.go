//go:build all

package elementcall

import (
	"bytes"
	"flag"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/patience"
)

const (
	// site is the URL of Element Call.
	site = "https://call.example.com"
	// delay is the delay of the leave event if Element Call restarts it itself.
	delay = 18 * time.Second
	// promptly limits the time from when a leave event is due until the other user's page shows it.
	promptly = 5 * time.Second
	// settled is longer than LiveKit's clients, and the homeserver, take to find that somebody is gone.
	settled = 30 * time.Second
)

// noticed limits the time until a crash is visible. LiveKit needs 20 seconds of it, and the page of the other user some part of the rest.
var noticed = 20*time.Second + patience.For(5*time.Second)

var tries = flag.Int("tries", 1, "how often each kind of crash is tried in TestCall")

// meeting are two users who meet in a call, one of whom gets into trouble.
type meeting struct {
	*stack
	alice, bob *browser
	link       string
}

// Alice and bob have accounts, and the homeserver takes their leave events. Whatever is restarted, nobody is thrown out, and whoever crashes
// is gone in time.
func TestCall(t *testing.T) {
	s := start(t, options{})
	m := &meeting{stack: s, alice: s.newBrowser(t, "alice"), bob: s.newBrowser(t, "bob")}
	for _, b := range []*browser{m.alice, m.bob} {
		s.account(t, b.name)
		b.do(t, nil, "login", site, b.name, homeserver.Password)
	}
	m.alice.do(t, &m.link, "begin", site, "Standup")
	m.bob.do(t, nil, "follow", m.link)
	m.meet(t)
	for range *tries {
		m.crash(t, noticed, func() {})

		// Both are restarted while the call runs, and the browser of one is frozen, as on a lost network. Nobody is thrown out, although pages
		// show some tiles only when they are connected again.
		sent := m.sentLeaves(t)
		m.homeserver.Kill()
		require.NoError(t, m.homeserver.Start(t.Context()))
		m.livekit.kill()
		m.livekit.start(t)
		time.Sleep(settled)
		m.requireSeen(t)
		m.alice.freeze(t, 10*time.Second)
		m.requireSeen(t)
		require.Equal(t, sent, m.sentLeaves(t), "nobody has left")

		// Then one crashes, and the homeserver with her.
		m.crash(t, noticed, func() {
			m.homeserver.Kill()
			require.NoError(t, m.homeserver.Start(t.Context()))
		})
	}

	// Whoever leaves while LiveKit is away is gone at once.
	m.livekit.kill()
	left := m.alice.do(t, nil, "leave")
	gone := m.bob.do(t, nil, "misses", m.alice.user)
	t.Logf("alice was shown for %s after she left, while LiveKit was away", gone.Sub(left).Round(time.Millisecond))
	require.Less(t, gone.Sub(left), promptly)
}

// Anyone with the link can join, and the server takes no leave events. Element Call restarts its own leave event, and the server sends the
// event when the restarts end.
func TestCallByLink(t *testing.T) {
	s := start(t, options{openRegistration: true, noDelegation: true})
	m := &meeting{stack: s, alice: s.newBrowser(t, "alice"), bob: s.newBrowser(t, "bob")}
	m.alice.do(t, &m.link, "begin", site, "Standup", m.alice.name)
	m.bob.do(t, nil, "follow", m.link, m.bob.name)
	m.meet(t)
	m.crash(t, delay+promptly, func() {})
}

// meet lets the users, who are in the lobby, join the call.
func (m *meeting) meet(t *testing.T) {
	t.Helper()
	m.alice.do(t, &m.alice.user, "join")
	m.bob.do(t, nil, "watch", m.alice.user)
	m.bob.do(t, &m.bob.user, "join")
	m.requireSeen(t)
	m.pictures(t, "1-met")
}

// crash kills alice's browser, and then whatever befalls. It requires that bob's page stops showing her in time, and that she can join again.
func (m *meeting) crash(t *testing.T, inTime time.Duration, befalls func()) {
	t.Helper()
	crashed := m.alice.crash(t)
	befalls()
	gone := m.bob.do(t, nil, "misses", m.alice.user)
	t.Logf("alice was shown for %s after her browser crashed", gone.Sub(crashed).Round(time.Millisecond))
	m.bob.picture(t, "2-alone")
	require.Less(t, gone.Sub(crashed), inTime)
	requireShown(t, m.bob, m.bob.user)

	m.alice.start(t)
	m.alice.do(t, nil, "follow", m.link)
	m.alice.do(t, nil, "join")
	m.requireSeen(t)
	m.pictures(t, "3-back")
	var most int
	m.bob.do(t, &most, "most")
	require.Equal(t, 1, most, "how often alice was shown at one time")
}

// sentLeaves returns how many leave events the homeserver has sent.
func (m *meeting) sentLeaves(t *testing.T) int {
	t.Helper()
	written, err := m.homeserver.Written()
	require.NoError(t, err)
	return bytes.Count(written, []byte("Sent a delayed event"))
}

// requireSeen requires that each of the two users sees the other one's video move, and that no user is shown twice.
func (m *meeting) requireSeen(t *testing.T) {
	t.Helper()
	for _, pair := range [][2]*browser{{m.alice, m.bob}, {m.bob, m.alice}} {
		pair[0].do(t, nil, "sees", pair[1].user)
		requireShown(t, pair[0], m.alice.user, m.bob.user)
	}
}

// requireShown requires that exactly these users are shown.
func requireShown(t *testing.T, b *browser, users ...string) {
	t.Helper()
	var shown []string
	b.do(t, &shown, "shown")
	require.ElementsMatch(t, users, shown, "whom %s sees", b.name)
}

func (m *meeting) pictures(t *testing.T, what string) {
	t.Helper()
	m.alice.picture(t, what)
	m.bob.picture(t, what)
}
