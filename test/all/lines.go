package main

import (
	"fmt"
	"os"
	"path/filepath"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/patches"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
)

const (
	// part is what is run on each line: the ways in which the component meets what differs from line to line (sends, the output
	// stream, the syncapi's tables, room versions, federation), and some of the crashes.
	part = "^(TestSending|TestKeepAlive|TestClosing|TestRoomVersions|TestDelayedRestart|" +
		"TestDelayIDInUnsigned|TestRestart|TestCrashes|TestStreamIsBehind|TestStateAfterConflicts|TestFederation|TestMetrics)$"
	// someCrashes is at least one at each place.
	someCrashes = "-crashes=18"
	// ownCommand is what only our own command does: data folder, one line for a failure, stop in order, both versions, the
	// answers of the Dendrite that our module depends on.
	ownCommand = "^(TestDataFolder|TestStartFailures|TestUnixSocket|TestBadTransports|TestSameAsStock|TestVersion)$"
)

// lines returns the lines of Dendrite to test. The maintained one is under the AGPL, and nobody downloads it without asking for it.
func (r *runner) lines() []patches.Line {
	if r.elementHQ {
		return patches.Lines
	}
	return []patches.Line{patches.Apache}
}

// runPatches runs the tests of package patches.
func runPatches(r *runner) error {
	return r.run(tests("./patches", fmt.Sprintf("-element-hq=%v", r.elementHQ)).args)
}

// runLines runs the contract against each line's own command.
func runLines(r *runner) error {
	for _, line := range r.lines() {
		if err := r.runLine(line); err != nil {
			return fmt.Errorf("%s: %w", line, err)
		}
	}
	return nil
}

func (r *runner) runLine(line patches.Line) error {
	dir, err := os.MkdirTemp("", "msc4140-line-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	source := filepath.Join(dir, "dendrite")
	if err = line.Copy(source); err != nil {
		return err
	}
	tree, err := patches.Open(source)
	if err != nil {
		return err
	}
	if _, err = tree.Apply(); err != nil {
		return err
	}
	suite := tests("-run="+part, integration, someCrashes)
	if r.whole {
		suite = tests("-skip="+ownCommand, integration)
	}
	r.say("   on %s", line)
	return r.run(suite.args, homeserver.Tree+"="+source)
}
