//go:build all

package elementcall

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
)

const (
	// site is where Element Call is.
	site = "https://call.example.com"
	// delay is that of the leave event which Element Call schedules if it has to put it off itself.
	delay = 18 * time.Second
	// promptly is how long it may take from when the server is to send a leave event until the other one's page shows it.
	promptly = 5 * time.Second
	// noticed is how long it may take until a crash has shown: LiveKit must find out, and say so.
	noticed = 25 * time.Second
)

// alice and bob have accounts. Alice's browser crashes, and LiveKit has the server send her leave event.
func TestCall(t *testing.T) {
	s := start(t, options{})
	alice, bob := s.newBrowser(t, "alice"), s.newBrowser(t, "bob")
	for _, b := range []*browser{alice, bob} {
		s.account(t, b.name)
		b.do(t, nil, "login", site, b.name, homeserver.Password)
	}
	var link string
	alice.do(t, &link, "begin", site, "Standup")
	bob.do(t, nil, "follow", link)
	meet(t, alice, bob, link, noticed)
}

// Anybody with the link can join, and the service for tokens is one that does not take leave events: Element Call puts its
// own off, and the server sends it when that ends.
func TestCallByLink(t *testing.T) {
	s := start(t, options{openRegistration: true, oldAuthService: true})
	alice, bob := s.newBrowser(t, "alice"), s.newBrowser(t, "bob")
	var link string
	alice.do(t, &link, "begin", site, "Standup", alice.name)
	bob.do(t, nil, "follow", link, bob.name)
	meet(t, alice, bob, link, delay+promptly)
}

// meet lets two who are in the lobby join the call, has the browser of one crash, requires that the other one's page stops
// showing her in time, and has her come back.
func meet(t *testing.T, alice, bob *browser, link string, inTime time.Duration) {
	t.Helper()
	both := []*browser{alice, bob}
	alice.do(t, &alice.user, "join")
	bob.do(t, nil, "watch", alice.user)
	bob.do(t, &bob.user, "join")
	requireSeen(t, both)
	pictures(t, both, "1-met")

	crashed := alice.crash(t)
	gone := bob.do(t, nil, "misses", alice.user)
	t.Logf("alice was shown for %s after her browser crashed", gone.Sub(crashed))
	bob.picture(t, "2-alone")
	require.Less(t, gone.Sub(crashed), inTime)
	requireShown(t, bob, bob.user)

	alice.start(t)
	alice.do(t, nil, "follow", link)
	alice.do(t, nil, "join")
	requireSeen(t, both)
	pictures(t, both, "3-back")
	var most int
	bob.do(t, &most, "most")
	require.Equal(t, 1, most, "how often alice was shown at one time")
}

// requireSeen requires that each of two sees the other one's video move, and that nobody is shown twice.
func requireSeen(t *testing.T, both []*browser) {
	t.Helper()
	for i, b := range both {
		b.do(t, nil, "sees", both[1-i].user)
		requireShown(t, b, both[0].user, both[1].user)
	}
}

// requireShown requires that these are shown, and nobody else.
func requireShown(t *testing.T, b *browser, users ...string) {
	t.Helper()
	var shown []string
	b.do(t, &shown, "shown")
	require.ElementsMatch(t, users, shown, "whom %s sees", b.name)
}

func pictures(t *testing.T, both []*browser, what string) {
	t.Helper()
	for _, b := range both {
		b.picture(t, what)
	}
}
