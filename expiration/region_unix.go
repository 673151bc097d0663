//go:build unix

package expiration

import "golang.org/x/sys/unix"

// mapMemory returns memory from the operating system, or nil.
func mapMemory(size int) []byte {
	data, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return nil
	}
	return data
}

func unmapMemory(data []byte) { _ = unix.Munmap(data) }
