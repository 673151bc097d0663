package deployer

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Namespaces is the command that runs another command in the namespaces that a test needs. An unprivileged user becomes root in them. When
// that command's process ends, all processes in the namespaces end.
const Namespaces = "unshare --user --map-root-user --mount --net --pid --fork --kill-child"

// maxServers is how many servers have names.
const maxServers = 9

// address returns the address of the server hsN.
func address(name string) (string, error) {
	var n int
	if _, err := fmt.Sscanf(name, "hs%d", &n); err != nil || n < 1 || n > maxServers {
		return "", fmt.Errorf("a server is called hs1 to hs%d, not %q", maxServers, name)
	}
	return fmt.Sprintf("127.0.1.%d", n), nil
}

// isolate starts the network of the new namespaces. It names the servers and the host of the tests in /etc/hosts.
func isolate(testHost string) error {
	if os.Getpid() != 1 {
		return errors.New("the test is to be run by: " + Namespaces)
	}
	if err := bringUpLoopback(); err != nil {
		return fmt.Errorf("loopback: %w", err)
	}
	hosts := "127.0.0.1 localhost " + testHost + "\n"
	for n := 1; n <= maxServers; n++ {
		hosts += fmt.Sprintf("127.0.1.%d hs%d\n", n, n)
	}
	dir, err := os.MkdirTemp("", "complement-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	// Without a name server in resolv.conf, the resolver asks loopback, where no name server runs. So other names fail at once.
	for name, content := range map[string]string{"hosts": hosts, "resolv.conf": ""} {
		replacement := filepath.Join(dir, name)
		if err = os.WriteFile(replacement, []byte(content), 0o644); err != nil {
			return err
		}
		err = unix.Mount(replacement, "/etc/"+name, "", unix.MS_BIND, "")
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("/etc/%s: %w", name, err)
		}
	}
	return nil
}

func bringUpLoopback() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	loopback, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	loopback.SetUint16(unix.IFF_UP)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, loopback)
}
