// Command demo shows expiring events at work. It starts the homeserver in a throw-away folder on a free port. Then it plays a call with
// four participants over HTTP, with a real client library, and checks what each of them sees.
//
// It exits with 0 if everything was as docs/protocol.md says, and with 1 if not.
package main

import (
	"context"
	"crypto/rand"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"maunium.net/go/mautrix/event"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/commandline"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
)

// playTime limits the demo, counted from when the server is up.
const playTime = 60 * time.Second

func main() {
	server := flag.String("server", "", "The URL of a homeserver that is already up; default: a new one")
	secret := flag.String("registration-secret", "", "The registration_shared_secret of that homeserver; default: open registration")
	flag.Parse()
	err := commandline.NoArguments(flag.CommandLine, "a server that is already up is named with --server")
	if err == nil && *server == "" && *secret != "" {
		err = errors.New("--registration-secret is a secret of the server that --server names")
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err = demo(ctx, *server, *secret); err != nil {
		fmt.Fprintln(os.Stderr, "\ndemo: failed:", err)
		stop()
		os.Exit(1)
	}
}

func demo(ctx context.Context, serverURL, secret string) error {
	s := &story{screen: &screen{start: time.Now()}, server: serverURL, secret: secret, bobSees: make(chan *event.Event, 100)}
	if serverURL == "" {
		dir, err := os.MkdirTemp("", "msc4140-demo-")
		if err != nil {
			return err
		}
		defer func() { _ = os.RemoveAll(dir) }()
		hs, err := newServer(ctx, s.screen, dir)
		if err != nil {
			return err
		}
		defer hs.Kill()
		if err = s.screen.during("starting it", func() error { return hs.Start(ctx) }); err != nil {
			return err
		}
		s.server, s.secret = hs.URL, homeserver.SharedSecret
	} else {
		s.suffix = "-" + strings.ToLower(rand.Text()[:6]) // the names may be taken on that server
	}
	ctx, cancel := context.WithTimeout(ctx, playTime)
	defer cancel()
	return s.play(ctx)
}

// newServer builds a homeserver in a folder.
func newServer(ctx context.Context, screen *screen, dir string) (*homeserver.Server, error) {
	data := filepath.Join(dir, "data")
	if err := os.Mkdir(data, 0o700); err != nil {
		return nil, err
	}
	var binary string
	if err := screen.during("building the homeserver (minutes the first time)", func() (err error) {
		binary, err = homeserver.Build(ctx, dir)
		return err
	}); err != nil {
		return nil, err
	}
	return homeserver.New(binary, data, homeserver.Config{})
}
