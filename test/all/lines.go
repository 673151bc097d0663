package main

import (
	"fmt"
	"os"
	"path/filepath"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/patches"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
)

const (
	// part matches the tests that run on each line of Dendrite. They cover the places where the lines differ: sends, the output stream, the
	// syncapi's tables, room versions, federation, and some of the crashes.
	part = "^(TestSending|TestKeepAlive|TestClosing|TestRoomVersions|TestDelayedRestart|" +
		"TestDelayIDInUnsigned|TestRestart|TestCrashes|TestStreamIsBehind|TestStateAfterConflicts|TestFederation|TestMetrics)$"
	// someCrashes is a number of crashes that covers each crash point at least once.
	someCrashes = "-crashes=18"
	// ownCommand matches the tests of features that only our own command has: the data folder, one line for a failure, stopping in order,
	// both versions, and the answers of the Dendrite that our module depends on.
	ownCommand = "^(TestDataFolder|TestStartFailures|TestUnixSocket|TestBadTransports|TestSameAsStock|TestVersion)$"
)

// lines returns the lines of Dendrite to test. The maintained line is under the AGPL, so it is downloaded only if the user asks for it.
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

// runLines runs the integration tests against the command of each line.
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
