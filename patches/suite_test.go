package patches_test

import (
	"flag"
	"os"
	"os/exec"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/patches"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
)

var whole = flag.Bool("whole", false, "run the whole integration suite on each line, which takes long, instead of a part of it")

const (
	// part is what is run each time: the ways in which the component meets what differs from line to line (sends, the output
	// stream, the syncapi's tables, room versions, federation), and some of the crashes.
	part = "^(TestSending|TestKeepAlive|TestClosing|TestRoomVersions|TestDelayedRestart|" +
		"TestDelayIDInUnsigned|TestRestart|TestCrashes|TestStreamIsBehind|TestStateAfterConflicts|TestFederation|TestMetrics)$"
	// someCrashes is at least one at each place.
	someCrashes = "-crashes=18"
	// ownCommand is what only our own command does: data folder, one line for a failure, stop in order, both versions, the
	// answers of the Dendrite that our module depends on.
	ownCommand = "^(TestDataFolder|TestStartFailures|TestUnixSocket|TestBadTransports|TestSameAsStock|TestVersion)$"
)

// The tests of the contract pass on each line, with the tree's own command. Both are tested at the same time: they mostly wait.
func TestSuite(t *testing.T) {
	for _, line := range patches.Lines {
		dir := applied(t, line)
		t.Run(line.String(), func(t *testing.T) {
			t.Parallel()
			args := []string{"test", "-count=1"}
			if *whole {
				args = append(args, "-timeout=60m", "-skip", ownCommand, "../test/integration")
			} else {
				args = append(args, "-timeout=15m", "-run", part, "../test/integration", someCrashes)
			}
			suite := exec.CommandContext(t.Context(), "go", args...)
			suite.Env = append(os.Environ(), homeserver.Tree+"="+dir)
			suite.Stdout, suite.Stderr = t.Output(), t.Output()
			require.NoError(t, suite.Run())
		})
	}
}
