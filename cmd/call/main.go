// Command call is a call on this machine, from nothing: it starts the homeserver, LiveKit and Element Call's pages on loopback, and says
// which links to open. Two tabs of one browser are then in an encrypted call. From then on it prints what becomes of each participant.
//
// It guarantees that nothing is reachable from other machines, and that nothing is left when it ends, except what it has downloaded and
// built, which is in the user's cache folder.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/commandline"
)

// options are the flags.
type options struct {
	port           int
	livekit, pages string
	keep           bool
}

func main() {
	var o options
	flag.IntVar(&o.port, "port", 0, "The port of the links; default: a free one")
	flag.StringVar(&o.livekit, "livekit", "", "The path of livekit-server; default: the one in PATH, or else it is built")
	flag.StringVar(&o.pages, "pages", "", "The folder with Element Call's pages; default: they are downloaded with npm")
	flag.BoolVar(&o.keep, "keep", false, "Keep the folder with configurations, databases and logs")
	flag.Parse()
	if err := commandline.NoArguments(flag.CommandLine, "see --help"); err != nil {
		fmt.Fprintln(os.Stderr, "call:", err)
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	err := call(ctx, o)
	if ctx.Err() != nil {
		fmt.Println("\nEnded.")
	} else if err != nil {
		fmt.Fprintln(os.Stderr, "\ncall: failed:", err)
		stop()
		os.Exit(1)
	}
}

// call runs everything until ctx is done, or until a part of it fails.
func call(ctx context.Context, o options) error {
	cache, err := os.UserCacheDir()
	if err != nil {
		return err
	}
	screen := newScreen(os.Stdout)
	parts, err := getParts(ctx, screen, filepath.Join(cache, "msc4140-call"), o)
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "msc4140-call-")
	if err != nil {
		return err
	}
	if o.keep {
		screen.print("  logs and databases: %s\n", dir)
	} else {
		defer func() { _ = os.RemoveAll(dir) }()
	}
	s := &stack{dir: dir, parts: parts, watch: newWatch(screen)}
	defer s.stop()
	if err = screen.during("starting homeserver and LiveKit", func() error { return s.start(ctx, o.port) }); err != nil {
		return err
	}
	screen.print(`
The call is ready. Open both links in one browser:

  %s/join/Alice
  %s/join/Bob

These are two sites for the browser, so it has two logins. For somebody else, use another name in a private window.
To crash a tab, type chrome://crash in its address bar (Firefox: about:crashcontent). Ctrl-C ends everything.

`, s.url("localhost"), s.url(loopback))
	screen.restart()
	select {
	case <-ctx.Done():
		return nil
	case <-s.homeserver.Ended():
		return errors.New("the homeserver has ended")
	case <-s.sfu.ended:
		return s.sfu.failure()
	}
}
