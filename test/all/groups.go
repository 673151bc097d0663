package main

import (
	"errors"
	"os"
	"os/exec"
)

// A group is a set of steps that are run, or left out, together.
type group struct {
	name, what string
	// needs returns an error if the machine lacks a requirement; nil means that there is none. In CI, a group that cannot run has failed.
	needs func() error
	steps []step
}

// A step is a command, or a function that runs commands.
type step struct {
	args []string
	do   func(*runner) error
}

// limit ends a go test that hangs. It is far longer than any test takes, because a slow machine is not a fault.
const limit = "45m"

// integration is the package that tests docs/protocol.md. Its tests with the build tag all are divided among several groups by name. Its
// other tests are run by go test ./... already.
const integration = "./test/integration"

// tests returns the step that runs the tests of packages. Flags come before the packages.
func tests(flagsAndPackages ...string) step {
	return step{args: append([]string{"go", "test", "-json", "-count=1", "-tags=all", "-timeout=" + limit}, flagsAndPackages...)}
}

// several lets go test run more tests of integration beside each other than the machine has processors: they mostly wait. Tests that compare
// times are not parallel, and run before the others.
const several = "-parallel=4"

// testsOf returns the step that runs the tests of a module of its own, which is in a folder.
func testsOf(folder string) step {
	return step{args: append([]string{"go", "-C", folder}, tests("./...").args[1:]...)}
}

func command(args ...string) step { return step{args: args} }

func fuzz(pkg, name, inputs string) step {
	// The limit is a number of inputs, because Go 1.26 may report the end of a duration as a failure (golang/go#75804).
	return command("go", "test", pkg, "-run=^$", "-fuzz=^"+name+"$", "-fuzztime="+inputs)
}

var groups = []group{
	{name: "units", what: "the unit, model and storage tests again, with the race detector; the component without cgo", steps: []step{
		{do: runUnits},
		command("env", "CGO_ENABLED=0", "go", "test", "-trimpath", "./expiration/..."),
	}},
	{name: "fuzz", what: "what parses input of users, with random inputs", steps: []step{
		fuzz("./clientapi", "FuzzParseContent", "30000x"), fuzz("./clientapi", "FuzzReadToken", "30000x"),
		fuzz("./clientapi", "FuzzWellFormed", "10000x"), fuzz("./syncapi/delayid", "FuzzAddDelayIDs", "30000x"),
		fuzz("./jsondepth", "FuzzDepth", "30000x"), fuzz("./dendritefix", "FuzzDepth", "30000x"),
		fuzz("./rtc/livekit", "FuzzNames", "30000x"),
	}},
	{name: "races", what: "much at once, with the race detector in tests and server", steps: []step{
		tests("-race", several, "-run=^(TestOneWinner|TestDelayedEvents|TestFederationRaces|TestClockIsSet)$", integration),
	}},
	{name: "soak", what: "random clients while everything befalls their server, with the race detector", steps: []step{
		tests("-race", "-run=^TestSoak$", integration),
	}},
	{name: "crashes", what: "crashes at every step in the life of an event, and backups (sqlite3)", steps: []step{
		tests(several, "-run=^(TestCrashes|TestCrashesOfCalls|TestStateSetBack|TestStreamsThatForget|TestBackups)$", integration),
	}},
	{name: "outages", what: "the server stops; database, disk and roomserver away (PostgreSQL, and root for a full disk)", steps: []step{
		tests(several, "-run=^(TestPostgreSQLIsAway|TestDatabaseOutage|TestDiskIsFull|TestRoomserverRefuses|TestStreamIsBehind|TestStopsLoseNoEvents)$", integration),
	}},
	{name: "federation", what: "two servers, quiet rooms, and a hostile server", steps: []step{
		tests(several, "-run=^(TestFederation|TestFederationLateClosing|TestFederationQuietRooms|TestFederationRedactionInContent|"+
			"TestHostileServer|TestQuietRooms|TestRemoteRoomSummary|TestStateAfterConflicts|TestTokensBetweenServers|TestTokensForAHostileServer)$", integration),
	}},
	{name: "crowds", what: "many who replace, leave and end in the same moment", steps: []step{
		tests("-run=^(TestManyReplacedAtExpiry|TestManyEndWhileTheSenderLeaves)$", integration),
	}},
	{name: "abuse", what: "what strangers do to the open endpoint, what times give away, and the same answers as stock Dendrite", steps: []step{
		tests("-run=^(TestAbuse|TestDelayedAbuse|TestKeepAlivesThatHangUp|TestRealIPHeader|TestSameAsStock|TestSlowBodiesOfDelayedEvents|TestSummaryTiming)$", integration),
	}},
	{name: "patches", what: "the component in a Dendrite source tree", steps: []step{{do: runPatches}, {do: runLines}}},
	{name: "clients", what: "matrix-js-sdk and mautrix-go, as they are published (Node.js 18, npm)", steps: []step{tests("-race", "./test/clients")}},
	{name: "install", what: "the files of docs/install and of calls, with both proxies and systemd (caddy, nginx, systemd-analyze, PostgreSQL)", steps: []step{tests("-race", "./test/install")}},
	{name: "hostile", what: "hostile users, beside a bystander whose lateness is measured", steps: []step{tests("./test/hostile")}},
	{name: "livekit", what: "names, tokens, API and webhooks with the real LiveKit, and with its own library", steps: []step{
		command("go", "-C", "./test/livekit", "vet", "-tags=all", "./..."), testsOf("./test/livekit"),
	}},
	{name: "call", what: "a call on this machine, by one command (npm)", steps: []step{tests("./cmd/call")}},
	{name: "elementcall", what: "calls with Element Call in Chromium, over LiveKit (chromium, caddy, Node.js, npm)", steps: []step{tests("./test/elementcall")}},
	{name: "benchmark", what: "the benchmark, too short for figures", steps: []step{ // closings-in-rooms is closings-in-one-room with more rooms
		command("go", "run", "./test/bench", "-only", "keep-alives|many-timers|claims|sends|one-room|growth", "-rounds", "1", "-turn", "300ms", "-timers", "5000", "-idle", "300ms", "-due", "500",
			"-closings-in-room", "16", "-rooms", "4", "-refreshes", "50000"),
	}},
	{name: "release", what: "the release, the same in two folders", steps: []step{{do: runRelease}}},
	{name: "images", what: "the container images (root on Debian)", needs: rootOnDebian, steps: []step{command("docker/check")}},
}

// rootOnDebian returns an error if docker/check cannot run here.
func rootOnDebian() error {
	if _, err := exec.LookPath("apt-get"); err != nil || os.Geteuid() != 0 {
		return errors.New("it needs root on Debian")
	}
	return nil
}
