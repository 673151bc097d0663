//go:build all

package elementcall

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
)

const (
	// site is the URL of Element Call.
	site = "https://call.example.com"
	// delay is the delay of the leave event if Element Call restarts it itself.
	delay = 18 * time.Second
	// promptly limits the time from when a leave event is due until the other user's page shows it.
	promptly = 5 * time.Second
	// noticed limits the time until a crash is visible. LiveKit must detect it and report it.
	noticed = 25 * time.Second
)

// Alice and bob have accounts. Alice's browser crashes, and LiveKit's report makes the server send her leave event.
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

// Anyone with the link can join, and the token service does not accept leave events. Element Call restarts its own leave event, and the
// server sends the event when the restarts end.
func TestCallByLink(t *testing.T) {
	s := start(t, options{openRegistration: true, oldAuthService: true})
	alice, bob := s.newBrowser(t, "alice"), s.newBrowser(t, "bob")
	var link string
	alice.do(t, &link, "begin", site, "Standup", alice.name)
	bob.do(t, nil, "follow", link, bob.name)
	meet(t, alice, bob, link, delay+promptly)
}

// meet lets two users in the lobby join the call, and kills alice's browser. It requires that bob's page stops showing her in time, and
// that she can join again.
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

// requireSeen requires that each of the two users sees the other one's video move, and that no user is shown twice.
func requireSeen(t *testing.T, both []*browser) {
	t.Helper()
	for i, b := range both {
		b.do(t, nil, "sees", both[1-i].user)
		requireShown(t, b, both[0].user, both[1].user)
	}
}

// requireShown requires that exactly these users are shown.
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
